"""What `repopt --help` and `repopt COMMAND --help` say."""

OVERVIEW = """\
repopt: RepOptimizer training in JAX.

  repopt quickstart                             the whole path on handwritten digits, with a report
  repopt quickstart --config=scenes             the same with a detector: boxes, classes and keypoints
  repopt search --config=FILE --out=DIR         hyper-search: find scales
  repopt train --config=FILE --out=DIR          train a network
  repopt eval --run=DIR                         test accuracy (or AP) of a run or of a deployed network
  repopt predict IMAGE --run=DIR                draw what a detector finds on an image
  repopt deploy --run=DIR --out=DIR             fold a run into plain convolutions and save it
  repopt verify --config=FILE | --check=FILE    is the training that of the multi-branch network?
  repopt bench PARTS [--out=PATH]               time and memory of update, step, inference ...
  repopt convert IN OUT [--model=NAME]          PyTorch and safetensors files from and to our folders

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

Searches, extracts the scales, checks the equivalence, trains with the same epochs and seeds each way (plain
SGD, RepOpt with searched scales, RepVGG; classifiers also RepOpt with the depth rule), deploys, and writes a
report. Started again, it keeps what is there.

  --out=DIR               where everything goes (runs/quickstart)
  --seeds=N               how often each way is trained (2, a detector 1)
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
repopt eval --run=DIR [--checkpoint=WHICH] [--data_dir=DIR]

Accuracy and loss over the test images, each counted once, of a checkpoint of a run or of a deployed network;
of a detector COCO's average precision of boxes and of keypoints.

  --run=DIR               folder of a run, or of a deployment
  --checkpoint=WHICH      of a run: latest (that is used otherwise), best, or the number of a step
  --data_dir=DIR          where the images are now, if not where the run found them
"""

PREDICT = """\
repopt predict IMAGE --run=DIR [--out=FILE] [--threshold=X]

Draws what a detector finds on an image file: boxes with class and score, and keypoints. Lists them too.

  IMAGE                   PNG, JPEG or what else Pillow reads
  --run=DIR               folder of a run of a detector, or of its deployment
  --out=FILE              the picture (IMAGE with -detected.png for its ending)
  --threshold=X           least score of what is drawn (0.4); from the config's detect.score_threshold to 1
"""

DEPLOY = """\
repopt deploy --run=DIR --out=DIR [--checkpoint=WHICH] [--data_dir=DIR]

Folds batch norm and branches into plain convolutions, compares the outputs with those of the trained network
on test images, and saves the weights with what is needed to rebuild the network.

  --run=DIR               folder of the run
  --checkpoint=WHICH      latest (that is used otherwise), best, or the number of a step
  --out=DIR               folder of the deployment; new or empty
  --data_dir=DIR          where the images are now, if not where the run found them
"""

VERIFY = f"""\
repopt verify --config=FILE[:ARG] [--config.FIELD=VALUE ...] [--steps=N] [--tolerance=X]
repopt verify --check=FILE.py [--steps=N] [--tolerance=X]

Trains a network with re-parameterized gradients and its multi-branch twin under the ordinary optimizer, side
by side in float64 on the same batches, and compares them layer by layer. Exit code 0 where they stay
equal; 1 where they part, with the likely reason. float64 is slow: --config.batch_size=16 will do. Example:

  repopt verify --config=digits:depth --config.batch_size=16

{_CONFIG}\
  --check=FILE.py         your own network, loss and optimizers: a Python file whose get_check() returns a
                          repopt_jax.verify.Check; examples/verify_own_model.py is one
  --steps=N               steps of training (10; with --check, all of its batches)
  --tolerance=X           largest relative difference that counts as equal (1e-10)
  --layers=N              how many of the worst layers are shown (5), or all
"""

CONVERT = """\
repopt convert IN OUT [--model=NAME] [--kind=KIND] [--classes=N] [--key=ENTRY] [--to=NAMES]

Converts a PyTorch or safetensors file to a folder that `interop.load_converted` reads, or to such a file
with other names; our run, deployment or converted folder to a file; a file of scales to a folder. Checks the
number of parameters and, where PyTorch is installed, the outputs. Examples:

  repopt convert RepVGG-A0-train.pth a0 --model=repvgg-A0
  repopt convert runs/deployed b1.safetensors --to=timm

  IN, OUT                 a name that ends in .pth, .pt or .safetensors is a file; nothing may be at OUT
  --model=NAME            of a file: repopt-vgg-B1, repvgg-A0, mobileone-s0, repghost-0.5, repopt-ghostnet-0.5
  --kind=KIND             of a file, where its keys leave it open: csla, whose keys are those of a search
  --classes=N             how many the file must have (what it says)
  --key=ENTRY             of a checkpoint: the entry with the weights, where it is none of the usual
  --to=NAMES              names in OUT: repopt, repvgg, mobileone, repghost, timm (the network's own
                          authors'); or scales: of a file, its scales alone
"""

BENCH = """\
repopt bench PARTS [--variant=B1] [--size=224] [--batch=32,...] [--dtype=float32,...] [--out=PATH]

Measures what the rule costs, on the first device. Candidates run in turn, in every round in another order,
and are compared with one another in the same round. PARTS are joined by commas, or "all":

  update       SGD with decay: plain, repopt_mask, a stored multiplier; bytes/s beside a measured copy
  optimizers   AdamW, Lion and reparameterize, beside their plain counterparts
  step         training step and its memory: plain, RepOpt, CSLA, RepVGG
  largest      the largest batch whose training step fits in the memory
  inference    deployed networks, fused and not
  torch        training step and update in PyTorch, on the same device
  compile      compile time of a training step
  input        images/s of one core of the input pipeline, and the cores that the step asks for

  --variant=NAME          a variant of RepOptVGG (B1)
  --size=N                side of the images in pixels (224)
  --batch=N,...           images in a batch (32); each is measured
  --dtype=NAME,...        of the computation, float32 or bfloat16 (float32); each is measured
  --rounds=N              measurements of each candidate (15), at least 3
  --classes=N             of the classifier (1000)
  --networks=NAME,...     of step, largest, inference, torch and compile: plain, repopt, csla, csla-branches,
                          repvgg (all of them)
  --memory=GB             limit for the largest batch (what the device has)
  --tf32=no               no TF32 for float32, in JAX and in PyTorch (yes, where the device has it)
  --images=DIR            folder of images for input (made-up photographs)
  --out=PATH              writes PATH.json, PATH.md and PATH.png. What PATH.json holds already is kept, but
                          for what is measured again
"""
