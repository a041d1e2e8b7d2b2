"""How close numbers must be, or how far apart those of a negative control, and what was measured.

Float64 bounds are far above what was measured and far below any mistake; float32 bounds allow the rounding of
another order of sums.
"""

# A few operations in float32, relative to 1 + the number; measured: 5e-8.
FEW_OPERATIONS = 2e-6

# One training in frameworks with different layouts of convolutions, float32, 5 steps; measured: 4e-7; with
# OREPA's branches and scales in the optimizer 1.2e-7.
FRAMEWORKS = 1e-5
# What moves there, or moves in another way; measured: 2e-2, and without OREPA's branches 0.24.
FRAMEWORKS_APART = 1e-2

# A search tree against the optimizer and against NNX, float64, 10 steps, of a leaf's largest entry; measured:
# 7e-16.
SEARCH_TREE = 1e-12
# Another training, in the same measure; measured: 5e-2.
SEARCH_TREE_APART = 1e-3

# One training on several devices, in either dtype, against one device in float64, 20 steps, of an array's
# largest entry; measured over seeds 0 to 7: 4.3e-6 and 2e-15. The reference is not float32 on one device,
# which is farther from the truth than any of them: 9.1e-6, in the bias of the first batch norm, whose
# gradient is one long sum there.
DEVICES = {"float32": 1e-5, "float64": 1e-11}
# Two processes of two devices against one process of four, float32, 12 steps; measured with seeds 1 to 3:
# at most 6e-7 relative to 1 + the number.
PROCESSES = 1e-5

# Largest difference of a logit from PyTorch's, over the largest logit; measured: 1.8e-6 and 2.7e-15.
LOGITS_FLOAT32, LOGITS_FLOAT64 = 1e-4, 1e-9
# The same of a mistake in the conversion; measured: at least 0.65.
LOGITS_WRONG = 0.1
# Any number after 20 steps in PyTorch and here, float64, of numbers up to 3; measured: 8.9e-15, and 1.5e-14
# of networks of published blocks.
TRAINED_AS_TORCH = 1e-8
# The same with all parameters decayed, another running variance in DBB's padding, or no decay of OREPA's
# scales; measured: 0.1, 0.02, 0.08.
TRAINED_APART = 1e-3
# Running variances over n - 1 and over n, at least somewhere; measured: 0.066.
TORCH_VARIANCE_APART = 0.01
# A kernel after 3 steps without the multipliers; measured: 0.56.
WITHOUT_MULTIPLIERS = 0.05

# Convolutions as lowered for a CPU against XLA's in float64, rounded after each pass, with their derivatives,
# of 1 + an array's largest entry; measured over 40 to 90 drawn cases each: 4.1e-15, 1.7e-6 and 1.4e-2.
CONVOLUTIONS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}

# Networks of structures, merged against branch by branch, float64, of what an input changes in an output;
# measured: at most 2.6e-14.
STRUCTURES = 1e-12
# The same where the running means of one layer are moved by 0.5; measured: at least 0.41.
STRUCTURES_APART = 0.05

# A fused network against the one with branches, float32, after two steps, of the largest logit; measured:
# at most 2.4e-7.
FUSED_FLOAT32 = 1e-4

# A network of published blocks in PyTorch and here, float64, of the largest logit; measured: 7.5e-16.
BLOCKS = 1e-10
# The same with the thin kernels of ACNet exchanged, zeros in DBB's padding, two of OREPA's scales exchanged,
# or the outputs of one of its branches in another order; measured: 0.53, 0.018, 0.82, 0.54.
BLOCKS_WRONG = 1e-3
# OREPA's constants, by the cosines of two libraries, float64; measured: 0.
COSINES = 1e-14

# RepVGG's penalty in PyTorch and here, float64, relative; measured: 4.5e-16.
CUSTOM_L2 = 1e-12

# A RepMLPNet's mixer against loops, and branch by branch against merged, float64, of the largest entry;
# measured: 2e-15.
MIXER = 1e-12
# The same of a mistake; measured: at least 0.044.
MIXER_WRONG = 0.01
# A deployed RepMLPNet's logits against the trained one's, of the largest; measured over seeds 0 to 2: 5.6e-15
# and 1.1e-6.
DEPLOYED_MLP = {"float64": 1e-10, "float32": 1e-5}

# Compactors moved by ResRep's rule against loops, float64, 40 steps, of an array's largest entry; measured:
# 4.6e-16.
RESREP = 1e-12
# The same by `optax.MultiSteps`, which adds the parts in float32; measured: 1.6e-8.
RESREP_ACCUMULATED = 1e-6
# The same with mask and lasso behind the momentum, or the lasso once for each part of a batch; measured: 0.10
# and 0.44.
RESREP_APART = 1e-2
# Quantized layers against NumPy, float64, of the largest entry; measured: 6e-16.
QUANTIZED = 1e-12
# The same with other ranges, or without quantization, at 8 bits; measured: at least 3e-3.
QUANTIZED_APART = 1e-4
# Quantization-aware training with multipliers against that of branches, float64, 10 steps, of a leaf's
# largest entry; measured: 4.6e-16. Without multipliers; measured: at least 0.02.
QUANTIZATION_AWARE, QUANTIZATION_AWARE_APART = 1e-11, 1e-3
# Noise that is expected of a layer and measured, in dB, of random kernels and inputs; measured over 8 and 4
# bits, both kinds of scales: at most 0.5.
EXPECTED_DECIBEL = 1.5

# A network with compactors against the smaller one, of the largest output: in float64 where the rows that go
# are zero, and after a training; measured: 1.2e-14, and 2.6e-6 in scripts/results/resrep_digits.md.
SHRUNK_FLOAT64, SHRUNK_TRAINED = 1e-10, 1e-4
# The same where a row more of each layer goes, or with the published constant of a depthwise layer; measured:
# at least 0.14.
SHRUNK_WRONG = 1e-2

# A file that preprocesses or decodes images itself against doing so outside, float32, of an output's largest
# entry; measured: 0.
PREPROCESSED = 1e-5
# The same with two channels' means exchanged; measured: 9.7e-3.
PREPROCESSED_APART = 1e-3

# Logits of an INT8 file as onnxruntime runs it by default against the quantized network's, of the largest;
# measured: 1.0e-7 of 8 bits and 1.2e-7 of 4.
INT8_FILE = 1e-4
# The same against the network in floating point, of 4 bits; measured: 0.31.
INT8_FILE_APART = 0.05
# Logits by fused kernels against node by node where biases are not whole numbers of the products, of their
# span; measured: 1.0e-3 of 8 bits and 6.6e-2 of 4, and 0 where they are.
INT8_BIASES_APART = 3e-4

# An ONNX file in onnxruntime, float32, of an output's largest number; measured: at most 2.7e-7 of the tests'
# networks, 1.4e-6 of a published detector.
ONNX = 1e-5
# The same of a mistake in a node; measured: at least 3.9e-3.
ONNX_WRONG = 1e-3
# The share of whole numbers that differ from those of fake quantization; measured: 2.5e-6 layer by layer.
INT8_UNEQUAL = 1e-3
# The same of a deep network from end to end, whose scales have all digits; measured: 3e-3 to 7e-3.
INT8_ROUNDED = 1e-4
# The same of a mistake; measured: at least 0.17.
INT8_WRONG = 0.05
# Outputs of an INT8 network in onnxruntime, node by node, of the largest; measured: at most 2.6e-7.
INT8_OUTPUTS = 1e-5
# The same by onnxruntime's fused kernels against node by node, of the span of the first output; measured: at
# most 3.5e-3.
INT8_FUSED = 1e-2

# Networks of public collections, float64: three steps with branches and with the mask, and fused against
# branch by branch, of the largest entry; measured: 6.3e-15 and 1.2e-15 on the ResNet, the ConvNeXt below; of
# transposed convolutions at stride 1, 1.9e-13 and 4.2e-16.
STRANGERS = 1e-10

# Temporaries of the gradient of four depthwise layers, of those with XLA's convolutions; measured: 1.006, and
# 1.11 where each padded map is kept from the forward pass.
DEPTHWISE_MEMORY = 1.05
