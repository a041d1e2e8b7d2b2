"""What `repopt --help` and `repopt COMMAND --help` say."""

OVERVIEW = """\
repopt: RepOptimizer training in JAX.

  repopt quickstart                             the whole path on handwritten digits, with a report
  repopt search --config=FILE --out=DIR         hyper-search: find scales
  repopt train --config=FILE --out=DIR          train a network
  repopt eval --run=DIR                         test accuracy of a run or of a deployed network
  repopt deploy --run=DIR --out=DIR             fold a run into plain convolutions and save it

`repopt COMMAND --help` tells more.
"""

_CONFIG = """\
  --config=FILE[:ARG]     a Python file with `get_config(arg)`, or the name of a shipped one, such as digits
  --config.FIELD=VALUE    sets one field, for instance --config.optim.learning_rate=0.05 or --config.seed=3
"""

_OUT = """\
  --out=DIR               folder of the run. An unfinished run of the same config in it is continued, a
                          finished one reported again; a folder with another run is refused
"""

QUICKSTART = f"""\
repopt quickstart [--out=DIR] [--seeds=N] [--config=FILE] [--config.FIELD=VALUE ...]

Searches, extracts the scales, checks the equivalence, trains four ways with the same epochs and seeds (plain
SGD, RepOpt with searched scales, RepOpt with the depth rule, RepVGG), deploys, and writes a report. Started
again, it keeps what is there.

  --out=DIR               where everything goes (runs/quickstart)
  --seeds=N               how often each way is trained (2)
{_CONFIG}"""

SEARCH = f"""\
repopt search --config=FILE[:ARG] --out=DIR [--config.FIELD=VALUE ...]

Trains a network of kind "search", says whether its scales have settled, and leaves them in DIR/scales.
Example: repopt search --config=digits:search --out=runs/digits/search

{_CONFIG}{_OUT}"""

TRAIN = f"""\
repopt train --config=FILE[:ARG] --out=DIR [--config.FIELD=VALUE ...]

Trains one network. `--config.scales` trains a plain network by RepOpt: ones, depth, or the folder that a
search wrote. Example:

  repopt train --config=digits:repopt --config.scales=runs/digits/search/scales --out=runs/digits/repopt

{_CONFIG}{_OUT}"""

EVAL = """\
repopt eval --run=DIR [--data_dir=DIR]

Accuracy and loss over the test images, each counted once, of the last checkpoint of a run or of a deployed
network.

  --run=DIR               folder of a run, or of a deployment
  --data_dir=DIR          where the images are now, if not where the run found them
"""

DEPLOY = """\
repopt deploy --run=DIR --out=DIR [--data_dir=DIR]

Folds batch norm and branches into plain convolutions, compares the outputs with those of the trained network
on test images, and saves the weights with what is needed to rebuild the network.

  --run=DIR               folder of the run
  --out=DIR               folder of the deployment; new or empty
  --data_dir=DIR          where the images are now, if not where the run found them
"""
