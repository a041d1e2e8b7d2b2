"""Networks of the user's own: the file that registers one is noted in the config, and imported when a run is
read by a program that does not know the network yet.

A run holds numbers and text, and no code: its config names the file that it was trained with. To read the run
imports that file, as `--config` would, and says so. Only an absolute path is followed, so that a folder that
someone else has made cannot bring along the file that it names.
"""

import logging
from pathlib import Path
from typing import Any, Final

from repopt_jax import models, userfile
from repopt_jax.models import registry

logger: Final = logging.getLogger(__name__)


def note_file(config: Any, path: Path) -> None:
    """Notes in a config that its networks of the user's own come from the config file `path`, if it has
    registered any, or if the network is none of this package's."""
    model, file = config.model, path.absolute()
    name = model.name.lower() if isinstance(getattr(model, "name", None), str) else ""
    own = name in models.list() and name not in registry.SHIPPED
    if name and not model.file and (own or file in registry.FILES.values()):
        model.file = str(file)


def register_own(config: Any) -> None:
    """Makes the network of a config known, if it is one of the user's own that is not: imports `model.file`.

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: its path is not absolute, or the file does not register the network, or another file has
        registered one of this name; or, as ModuleNotFoundError, it cannot be imported.
    """
    name, file = (getattr(config.model, field, None) for field in ("name", "file"))
    if not (isinstance(name, str) and isinstance(file, str) and file):
        return
    name, path = name.lower(), Path(file)
    if name in registry.SHIPPED:
        return
    if name in models.list():
        known = registry.FILES.get(name, path)
        if known != path and path.is_file():
            raise ValueError(
                f"the network {name!r} is that of {known} in this program, and `model.file`={file!r} "
                "may have another: give them different names, or read them in different programs"
            )
        return
    if name not in registry.FILES and path in registry.FILES.values():
        return  # it has been imported, and the name is just none: the rule of the field says which there are
    if not path.is_absolute():
        raise ValueError(
            f"`model.file`={file!r}, which registers the network {name!r}, must be an absolute path"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"the network {name!r} is registered by {path} (`model.file` of the config), which is not there: "
            "put it back, or change `model.file` in the config.json of the run, or in the deploy.json of the "
            "deployment, to where it is now"
        )
    logger.info("the network %r is of %s, which is imported", name, path)
    with registry.registering(path):
        userfile.execute(path)
    if name not in models.list():
        raise ValueError(
            f"{path} (`model.file`) does not register the network {name!r}: when it is imported it must call "
            f"models.register(models.Entry({name!r}, ...))"
        )
