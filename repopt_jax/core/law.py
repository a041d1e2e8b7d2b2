"""x"""

import math


def identity_by_decay(Lambda: float) -> float:
    return math.exp(-Lambda)
