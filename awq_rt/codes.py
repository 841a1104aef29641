"""Every code that an error, a refusal or a finding may carry: what it means, what mends it, and a command to copy.

The one place where codes are explained: `awq-rt doctor` quotes it, and TROUBLESHOOTING.md is made from it by
`tools/troubleshooting.py`. Standard library only. A code keeps its meaning for ever; one that goes is not used again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PAGE = "TROUBLESHOOTING.md"


@dataclass(frozen=True, slots=True)
class Code:
    """What a code stands for. `cause` is why it happens, `remedy` what to do; `command` shows or mends it."""

    code: str
    title: str
    cause: str
    remedy: str
    command: str

    @property
    def page(self) -> str:
        """Where the documentation explains it."""
        return f"{PAGE}#{self.code.lower()}"


def known(code: str) -> Code | None:
    """What is known of `code`; None for that of a stranger's plugin."""
    return CODES.get(code)


_DOWNLOAD = "hf download OWNER/MODEL --local-dir MODEL"
_INSPECT = "awq-rt inspect MODEL"
_TORCH = "python -c 'import torch; print(torch.__version__, torch.version.cuda, torch.version.hip)'"

_FAMILIES: Mapping[str, tuple[Code, ...]] = {
    "General": (
        Code(
            "AWQ-000",
            "An error of awq_rt",
            "The base of every error that awq_rt raises on purpose; what is raised has a code of its own.",
            "Read the message.",
            "awq-rt doctor",
        ),
    ),
    "Checkpoints": (
        Code(
            "AWQ-CKPT-000",
            "A checkpoint cannot be used as it is",
            "The base of every error about a checkpoint.",
            "Read the message.",
            _INSPECT,
        ),
        Code(
            "AWQ-CKPT-001",
            "No checkpoint was found",
            "The path does not exist, or the folder holds no .safetensors, .pt or .bin file.",
            "Check the path. A hub id has the form owner/model.",
            "ls -l MODEL",
        ),
        Code(
            "AWQ-CKPT-002",
            "The hub could not be reached",
            "There is no network and the cache does not hold it; or it does not exist, or needs permission.",
            "Check the name and the network; for a gated repository, log in.",
            "hf auth login",
        ),
        Code(
            "AWQ-CKPT-003",
            "A file of the checkpoint is missing",
            "The index names a file that is not there: a download was interrupted, or a file was removed.",
            "Download the checkpoint again; what is complete is not fetched twice.",
            _DOWNLOAD,
        ),
        Code(
            "AWQ-CKPT-004",
            "A file is damaged",
            "It is empty, shorter than its header says, or its header cannot be right: an interrupted download, a full "
            "disk, or a Git LFS pointer in the place of the file.",
            "Delete the file and download it again.",
            _DOWNLOAD,
        ),
        Code(
            "AWQ-CKPT-005",
            "A pickle holds more than tensors",
            "A .pt or .bin file asks for objects that are no tensors in plain containers. Loading them would run code; "
            "the file was refused without running any.",
            "Use a safetensors version of the model.",
            _DOWNLOAD,
        ),
        Code(
            "AWQ-CKPT-006",
            "A tensor is missing",
            "The index, the layout or the model needs a tensor that no file holds; often files of two versions mixed.",
            "Download the checkpoint into an empty folder.",
            _DOWNLOAD,
        ),
        Code(
            "AWQ-CKPT-007",
            "A tensor contradicts its layout",
            "Its shape, dtype or values are not what the packing or the tensors beside it need.",
            "Download it again; if that does not help, the program that wrote it made a mistake.",
            _INSPECT,
        ),
        Code(
            "AWQ-CKPT-008",
            "Scales are not finite",
            "The scales of a linear hold NaN or infinity: quantisation overflowed where the checkpoint was made.",
            "Use another checkpoint, or quantise the model again.",
            "awq-rt quantize DENSE_MODEL DESTINATION",
        ),
        Code(
            "AWQ-CKPT-009",
            "The configuration contradicts the tensors",
            "config.json or quant_config.json states a group size, layout or zero points that the tensors do not have.",
            "Where the tensors are right, correct the configuration; the message names both.",
            _INSPECT,
        ),
        Code(
            "AWQ-CKPT-010",
            "A configuration file cannot be used",
            "It is no JSON, holds a value of the wrong kind, or an argument has a value that is not known.",
            "Correct the file or the argument that the message names.",
            "python -m json.tool MODEL/config.json",
        ),
        Code(
            "AWQ-CKPT-011",
            "Another kind of quantisation",
            "The checkpoint is quantised, but not as 4-bit AWQ: GPTQ, bitsandbytes, EXL2, HQQ, FP8 and others.",
            "Look for an AWQ checkpoint of the model, or load this one with the library that the message names.",
            _INSPECT,
        ),
        Code(
            "AWQ-CKPT-012",
            "Nothing is quantised",
            "The checkpoint holds no packed 4-bit tensor: it is the dense model.",
            "Quantise it, or look for an AWQ checkpoint.",
            "awq-rt quantize MODEL DESTINATION",
        ),
        Code(
            "AWQ-CKPT-013",
            "The tensors do not fit the model",
            "config.json describes another model than the tensors are of, or one that this transformers does not have.",
            "Use the config.json that belongs to the checkpoint; a new architecture may need a newer transformers.",
            "pip install --upgrade transformers",
        ),
        Code(
            "AWQ-CKPT-014",
            "The model needs its own Python code",
            "transformers has no such architecture, and the checkpoint brings code for it. Code from a checkpoint can "
            "do anything that you can, so it runs only when you ask for it.",
            "Read the .py files of the checkpoint. If you trust them, allow them.",
            "awq-rt generate MODEL 'Hello' --trust-remote-code",
        ),
    ),
    "Writing": (
        Code(
            "AWQ-WRITE-000",
            "A checkpoint could not be written",
            "The disk is full, the folder cannot be written, or the system refused; the destination is as it was.",
            "Make room, or choose another destination.",
            "df -h DESTINATION",
        ),
        Code(
            "AWQ-WRITE-001",
            "The destination exists",
            "Something is there already, and nothing is replaced unless asked for.",
            "Choose another destination; a checkpoint can be replaced with --force.",
            "ls -l DESTINATION",
        ),
        Code(
            "AWQ-WRITE-002",
            "The layout cannot hold a weight",
            "A shape, a zero point or a scale does not fit the layout asked for.",
            "Choose another layout; compressed-tensors holds all.",
            "awq-rt convert MODEL DESTINATION --to compressed-tensors",
        ),
        Code(
            "AWQ-WRITE-003",
            "No such layout",
            "The name is unknown, or the layout can be read and not written.",
            "Choose gemm, gemv, gemv_fast or compressed-tensors.",
            "awq-rt convert --help",
        ),
    ),
    "Quantising": (
        Code(
            "AWQ-QUANT-000",
            "A model could not be quantised",
            "The base of every error of the quantiser. What was finished is kept.",
            "Read the message.",
            "awq-rt quantize --help",
        ),
        Code(
            "AWQ-QUANT-001",
            "The source is quantised already",
            "It holds packed weights, or its configuration names a quantisation.",
            "Give the dense model.",
            _INSPECT,
        ),
        Code(
            "AWQ-QUANT-002",
            "A weight is not finite",
            "It holds NaN or infinity, or a value too large for the dtype that it is stored in.",
            "Use another copy of the dense model; a bfloat16 model may not fit float16.",
            "awq-rt quantize MODEL DESTINATION",
        ),
        Code(
            "AWQ-QUANT-003",
            "An activation is not finite",
            "While the calibration text was read a layer's input became NaN or infinity, mostly float16's range.",
            "Compute in bfloat16 or float32.",
            "awq-rt quantize --help",
        ),
        Code(
            "AWQ-QUANT-004",
            "The calibration text is too short",
            "It is empty, or gives fewer tokens than one sample needs.",
            "Give more text, or ask for shorter samples.",
            "awq-rt quantize --help",
        ),
        Code(
            "AWQ-QUANT-005",
            "The calibration source cannot be read",
            "No such file or data set, or of a kind that is not known.",
            "Give a text file, or the name of a data set.",
            "awq-rt quantize --help",
        ),
        Code(
            "AWQ-QUANT-006",
            "The tokenizer does not fit the model",
            "Token ids exceed the vocabulary, or there is no tokenizer to make them.",
            "Put the model's own tokenizer files beside its weights.",
            "ls MODEL/tokenizer*",
        ),
        Code(
            "AWQ-QUANT-007",
            "Some linears cannot be packed",
            "Their shapes are ones that 4-bit packing does not hold, and all were asked for; or none can be packed.",
            "Choose another group size, or leave them dense.",
            "awq-rt quantize --help",
        ),
        Code(
            "AWQ-QUANT-008",
            "An unfinished run differs",
            "What lies beside the destination was made from another model, text or settings, or is damaged.",
            "Go on with the settings that it was started with, or remove it.",
            "ls -ld DESTINATION*",
        ),
        Code(
            "AWQ-QUANT-009",
            "A setting has an impossible value",
            "A setting of the search is outside the values that it can have.",
            "Correct the setting that the message names.",
            "awq-rt quantize --help",
        ),
    ),
    "Devices and backends": (
        Code(
            "AWQ-DEVICE-001",
            "torch does not reach the device",
            "There is no such device, or this build of torch cannot use it: a build for the CPU only, for the other "
            "vendor's GPUs, or for a CUDA or ROCm that the driver does not serve.",
            "Install the build of torch for the GPU and its driver.",
            _TORCH,
        ),
        Code(
            "AWQ-BACKEND-000",
            "A backend failed",
            "The base of every error of a backend.",
            "Read the message.",
            "awq-rt doctor",
        ),
        Code(
            "AWQ-BACKEND-001",
            "No such backend",
            "backend= names one that is not installed.",
            "Install it, or choose one that is there.",
            "awq-rt doctor",
        ),
        Code(
            "AWQ-BACKEND-002",
            "No such kernel",
            "kernel= names a family that no usable backend has, or not the one pinned with backend=.",
            "Choose kernel='auto', or a family that the doctor lists.",
            "awq-rt doctor",
        ),
        Code(
            "AWQ-BACKEND-003",
            "The backend asked for is quarantined",
            "It is installed, and failed when it was loaded or tried; the message has the code of that.",
            "Mend what the other code says, or leave backend= out.",
            "awq-rt doctor",
        ),
        Code(
            "AWQ-BACKEND-004",
            "No backend serves it",
            "Every installed backend refuses the linear on this device, or no backend drives the GPU.",
            "Install the backend for the GPU; each refusal in the message has its own remedy.",
            "pip install 'awq-rt[cuda]'  # NVIDIA; 'awq-rt[rocm]' for AMD",
        ),
        Code(
            "AWQ-BACKEND-005",
            "No backend could be loaded",
            "Not even the reference backend, which every installation has.",
            "Install it again.",
            "pip install --force-reinstall awq-rt-reference",
        ),
        Code(
            "AWQ-BACKEND-010",
            "A plugin cannot be imported",
            "Importing it raised an error: a library that it needs is missing, or it is damaged.",
            "Update or reinstall the plugin.",
            "pip install --upgrade --force-reinstall PLUGIN",
        ),
        Code(
            "AWQ-BACKEND-011",
            "A plugin's self-test did not end",
            "The plugin was tried in a process of its own and hung.",
            "Update or uninstall it. On a slow machine, allow more seconds.",
            "AWQ_RT_EXAMINATION_TIMEOUT=600 awq-rt doctor",
        ),
        Code(
            "AWQ-BACKEND-012",
            "A plugin's self-test took its process down",
            "It crashed or ended its process, alone in a process of its own.",
            "Update or uninstall the plugin.",
            "python -X faulthandler -m awq_rt.testing.conformance PLUGIN",
        ),
        Code(
            "AWQ-BACKEND-013",
            "A plugin computes wrong numbers",
            "Its self-test left the bound of a right kernel, or broke the contract in another way.",
            "Update or uninstall the plugin.",
            "python -m awq_rt.testing.conformance PLUGIN",
        ),
        Code(
            "AWQ-BACKEND-014",
            "A plugin lacks part of the contract",
            "It has not all members that a backend has, or one is of the wrong kind.",
            "Install a version of the plugin that is made for this awq-rt.",
            "pip install --upgrade PLUGIN",
        ),
        Code(
            "AWQ-BACKEND-015",
            "A plugin speaks another contract",
            "It is written for another version of awq-rt's plugin contract.",
            "Install versions of awq-rt and the plugin that match.",
            "pip install --upgrade awq-rt PLUGIN",
        ),
        Code(
            "AWQ-BACKEND-016",
            "A plugin goes by two names",
            "Its entry point and the backend itself disagree on the name.",
            "Update the plugin.",
            "pip install --upgrade PLUGIN",
        ),
        Code(
            "AWQ-BACKEND-017",
            "Two plugins have one name",
            "Two distributions register the same backend, often an old and a new one; neither is trusted.",
            "Uninstall one of them.",
            "pip list | grep awq",
        ),
        Code(
            "AWQ-BACKEND-018",
            "A backend raised when it was asked",
            "The contract wants a refusal, not an error; the other backends serve.",
            "Update the plugin.",
            "pip install --upgrade PLUGIN",
        ),
        Code(
            "AWQ-BACKEND-019",
            "The search for backends failed",
            "Damaged metadata of some installed distribution, or a crash while plugins were loaded.",
            "Find which, and reinstall it.",
            "python -X faulthandler -m awq_rt.testing.conformance reference",
        ),
        Code(
            "AWQ-BACKEND-020",
            "A kernel is wrong for a shape of this model",
            "Before a backend serves a model, one linear of each shape is compared with the reference. This one left "
            "the bound, was not finite, or raised; another backend serves it instead.",
            "Update the GPU's driver and the plugin, and report it with a bundle.",
            "awq-rt doctor --bundle report.zip --redact",
        ),
        Code(
            "AWQ-RTC-001",
            "A kernel could not be compiled",
            "The run-time compiler refused a kernel; the message has its log, its options and the target.",
            "Update the compiler that the message names, and report it.",
            "awq-rt warmup MODEL",
        ),
        Code(
            "AWQ-RTC-002",
            "Compiling is forbidden",
            "A kernel is not in the cache, and AWQ_RT_NO_COMPILE is set.",
            "Compile ahead with the same AWQ_RT_CACHE, or unset the variable.",
            "AWQ_RT_NO_COMPILE=0 awq-rt warmup MODEL",
        ),
    ),
    "Inputs and running": (
        Code(
            "AWQ-INPUT-001",
            "A linear was handed a wrong tensor",
            "Its shape, dtype or device is not what the linear was loaded for.",
            "Load the model with dtype= of its inputs, and put both on one device.",
            "awq-rt inspect MODEL --all",
        ),
        Code(
            "AWQ-INPUT-002",
            "The parts of a weight contradict each other",
            "codes, zeros, scales and bias of an AwqWeight do not fit together.",
            "Correct the shapes and dtypes that the message names.",
            "python -c 'import awq_rt; help(awq_rt.AwqWeight)'",
        ),
        Code(
            "AWQ-MEMORY-001",
            "The device's memory does not suffice",
            "Weights, cache and what is needed for a moment are more than is free.",
            "End other programs on the device, use a shorter context, or several devices.",
            "awq-rt doctor MODEL",
        ),
        Code(
            "AWQ-FUSE-001",
            "The model cannot be fused",
            "fuse=True was asked for, and a module is not built as the fused decoder knows it.",
            "Leave fuse= out: it then runs as transformers runs it.",
            "awq-rt generate MODEL 'Hello'",
        ),
        Code(
            "AWQ-NUMERIC-001",
            "A module's output is not finite",
            "With AWQ_RT_CHECK=1 every module is watched; this is the first whose inputs were finite and whose output "
            "holds NaN or infinity: mostly float16's range.",
            "Load the model with dtype='bfloat16', or float32 on a CPU.",
            "AWQ_RT_CHECK=1 awq-rt generate MODEL 'Hello' --dtype bfloat16",
        ),
    ),
    "Several processes, adapters": (
        Code(
            "AWQ-PARALLEL-000",
            "Processes cannot work together",
            "The base of every error of a model that is cut over several devices.",
            "Read the message.",
            "torchrun --help",
        ),
        Code(
            "AWQ-PARALLEL-001",
            "There is no process for each device",
            "tp_plan= was given, and the program was not started by torchrun, or with more processes than devices.",
            "Start it with torchrun.",
            "torchrun --nproc-per-node 2 PROGRAM",
        ),
        Code(
            "AWQ-PARALLEL-002",
            "The model cannot be cut into so many parts",
            "Cuts lie between heads and between groups of weights; there are fewer parts than processes.",
            "Start as many processes as the doctor says are legal.",
            "awq-rt doctor MODEL",
        ),
        Code(
            "AWQ-PARALLEL-003",
            "Another process has gone",
            "A process of the model ended or does not answer; the first one to fail says why.",
            "Look at the output of the other processes.",
            "torchrun --nproc-per-node 2 --log-dir LOGS --redirects 3 PROGRAM",
        ),
        Code(
            "AWQ-ADAPTER-001",
            "An adapter needs the weight as a matrix",
            "Merging, DoRA and initialisation from a decomposition need what a 4-bit linear does not have.",
            "Keep the adapter beside the model, or dequantise it first.",
            "awq-rt convert --help",
        ),
    ),
    "Packages": (
        Code(
            "AWQ-PACKAGE-001",
            "A package has an unsupported version",
            "It is outside the versions that awq-rt is tested with.",
            "Install a supported version.",
            "pip install --upgrade awq-rt",
        ),
        Code(
            "AWQ-PACKAGE-002",
            "A required package is missing",
            "awq-rt was installed without its dependencies, or one was removed.",
            "Install it. Where `awq-rt` itself does not start, `python -m awq_rt.doctor` says what is missing.",
            "pip install awq-rt",
        ),
        Code(
            "AWQ-PACKAGE-003",
            "awq-rt is not installed",
            "It runs from a source tree: versions are unchecked, and plugins may not be found.",
            "Install the tree.",
            "pip install --editable .",
        ),
        Code(
            "AWQ-PACKAGE-004",
            "Two versions of a package are installed",
            "Python imports the one that it finds first. An update may have left the older one behind, or a folder in "
            "PYTHONPATH or of the user stands before the environment's.",
            "Uninstall it until none is left, then install one. What lies in a folder of PYTHONPATH, take out there.",
            "pip uninstall --yes NAME && pip install NAME",
        ),
        Code(
            "AWQ-TORCH-001",
            "torch is not installed",
            "No module of that name is found by this Python.",
            "Install it for your GPU.",
            "pip install torch",
        ),
        Code(
            "AWQ-TORCH-002",
            "torch cannot be imported",
            "Importing it raised an error: mostly a library of another version, or a file named torch.py nearby.",
            "Reinstall it in a fresh environment.",
            "pip install --force-reinstall torch",
        ),
        Code(
            "AWQ-TORCH-003",
            "Importing torch took its process down",
            "It crashed: mostly an instruction that the processor lacks, or two libraries that do not go together.",
            "See where it crashes; reinstall it in a fresh environment.",
            "python -X faulthandler -c 'import torch'",
        ),
        Code(
            "AWQ-TORCH-004",
            "torch is too old",
            "awq-rt uses parts of torch that this version does not have.",
            "Install a newer one.",
            "pip install --upgrade torch",
        ),
        Code(
            "AWQ-TORCH-005",
            "torch has no code for the GPU",
            "This build of torch was compiled for other architectures: its own operators fail with 'no kernel image'.",
            "Install a build of torch whose list of architectures has the GPU's.",
            "python -c 'import torch; print(torch.cuda.get_arch_list())'",
        ),
        Code(
            "AWQ-TRANSFORMERS-001",
            "transformers is not installed",
            "No module of that name is found by this Python.",
            "Install it.",
            "pip install 'transformers>=5.16,<6'",
        ),
        Code(
            "AWQ-TRANSFORMERS-002",
            "transformers cannot be imported",
            "Importing it raised an error, mostly one of a package that it needs.",
            "Reinstall it.",
            "pip install --force-reinstall 'transformers>=5.16,<6'",
        ),
        Code(
            "AWQ-TRANSFORMERS-003",
            "Importing transformers took its process down",
            "It crashed, mostly in a compiled package that it imports.",
            "See where it crashes.",
            "python -X faulthandler -c 'import transformers'",
        ),
    ),
    "NVIDIA GPUs": (
        Code(
            "AWQ-CUDA-001",
            "No NVIDIA driver",
            "nvidia-smi was not found. Nothing is wrong where there is no NVIDIA GPU.",
            "If there is one, install its driver.",
            "lspci | grep -i nvidia",
        ),
        Code(
            "AWQ-CUDA-002",
            "The NVIDIA driver does not answer",
            "nvidia-smi failed or hung: the kernel module and the driver's libraries are of two versions (after an "
            "update, until the machine restarts), or a GPU has fallen off the bus.",
            "Restart the machine; if that does not help, reinstall the driver.",
            "nvidia-smi; dmesg | grep -i nvrm",
        ),
        Code(
            "AWQ-CUDA-003",
            "No NVIDIA GPU is visible",
            "CUDA_VISIBLE_DEVICES hides all of them, or the driver lists none.",
            "Correct or unset the variable.",
            "env | grep CUDA_VISIBLE_DEVICES; nvidia-smi -L",
        ),
        Code(
            "AWQ-CUDA-004",
            "The NVIDIA driver is older than torch needs",
            "Each CUDA release needs a driver of at least some version; torch cannot use the GPU with an older one.",
            "Update the driver, or install a build of torch for an older CUDA.",
            "nvidia-smi --query-gpu=driver_version --format=csv",
        ),
        Code(
            "AWQ-CUDA-010",
            "Not an NVIDIA GPU",
            "The CUDA backend was asked to serve another device.",
            "Choose a device that the doctor lists.",
            "awq-rt doctor",
        ),
        Code(
            "AWQ-CUDA-011",
            "The GPU is too old for the CUDA backend",
            "Its kernels need compute capability 8.0 (Ampere): bfloat16 and asynchronous copies.",
            "Use the reference backend on this GPU; it is slow there, and right.",
            "awq-rt generate MODEL 'Hello' --backend reference --device cuda:0",
        ),
        Code(
            "AWQ-CUDA-012",
            "The CUDA backend does not serve the dtype",
            "Its kernels compute with float16 and bfloat16 activations.",
            "Choose one of them.",
            "awq-rt generate MODEL 'Hello' --dtype bfloat16",
        ),
        Code(
            "AWQ-CUDA-013",
            "The kernel asked for does not serve the shape",
            "kernel= pins a family, and the sizes or the group size are ones that it does not take.",
            "Choose kernel='auto'.",
            "awq-rt generate MODEL 'Hello' --kernel auto",
        ),
        Code(
            "AWQ-CUDA-014",
            "torch is built without CUDA",
            "The CUDA backend is installed beside a torch for the CPU or for ROCm.",
            "Install torch for CUDA.",
            _TORCH,
        ),
        Code(
            "AWQ-CUDA-015",
            "NVRTC does not know the GPU",
            "The GPU is newer than the run-time compiler that torch brought.",
            "Install a newer NVRTC, or a build of torch for a newer CUDA.",
            "pip install --upgrade 'awq-rt-cuda[cu13]'",
        ),
        Code(
            "AWQ-CUDA-016",
            "NVRTC cannot be loaded",
            "The run-time compiler, or the Python package that calls it, is missing or of another CUDA release.",
            "Install the extra of the CUDA that torch is built for.",
            "pip install 'awq-rt-cuda[cu12]'",
        ),
        Code(
            "AWQ-CUDA-017",
            "The CUDA driver does not answer",
            "libcuda cannot be loaded or asked: no driver, or one in a container without its libraries.",
            "Reinstall the driver; start the container with its GPUs.",
            "docker run --gpus all ... nvidia-smi",
        ),
        Code(
            "AWQ-CUDA-018",
            "The NVIDIA driver is older than NVRTC",
            "Code that a newer NVRTC makes cannot be loaded by an older driver.",
            "Update the driver, or install torch and awq-rt-cuda for an older CUDA.",
            "nvidia-smi",
        ),
        Code(
            "AWQ-CUDA-020",
            "The CUDA driver refused a call",
            "The message says which call, and what the driver answered. After an illegal access all later calls fail.",
            "Run again alone on the GPU; if it comes back, report it with a bundle.",
            "awq-rt doctor --bundle report.zip --redact",
        ),
    ),
    "AMD GPUs": (
        Code(
            "AWQ-ROCM-001",
            "No AMD driver",
            "The amdgpu driver's compute interface is not there. Nothing is wrong where there is no AMD GPU.",
            "If there is one, install its driver.",
            "ls -l /dev/kfd",
        ),
        Code(
            "AWQ-ROCM-002",
            "The AMD driver lists no GPU",
            "amdgpu is loaded, and has found no GPU that it can compute on.",
            "Look at what it says.",
            "dmesg | grep amdgpu",
        ),
        Code(
            "AWQ-ROCM-003",
            "No AMD GPU is visible",
            "ROCR_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES hides all of them.",
            "Correct or unset the variable.",
            "env | grep VISIBLE_DEVICES",
        ),
        Code(
            "AWQ-ROCM-004",
            "The AMD GPU cannot be opened",
            "Your user may not open /dev/kfd.",
            "Add the user to the groups render and video, and log in again.",
            "sudo usermod --append --groups render,video $USER",
        ),
        Code(
            "AWQ-ROCM-010",
            "Not an AMD GPU",
            "The ROCm backend was asked to serve another device.",
            "Choose a device that the doctor lists.",
            "awq-rt doctor",
        ),
        Code(
            "AWQ-ROCM-011",
            "The ROCm backend has no kernels for the GPU",
            "It is of an architecture that the kernels are not written for.",
            "Use the reference backend on this GPU; it is slow there, and right.",
            "awq-rt generate MODEL 'Hello' --backend reference --device cuda:0",
        ),
        Code(
            "AWQ-ROCM-012",
            "The ROCm backend does not serve the dtype",
            "Its kernels compute with float16 and bfloat16 activations.",
            "Choose one of them.",
            "awq-rt generate MODEL 'Hello' --dtype float16",
        ),
        Code(
            "AWQ-ROCM-013",
            "The kernel asked for does not serve the shape",
            "kernel= pins a family that the GPU or the sizes rule out.",
            "Choose kernel='auto'.",
            "awq-rt generate MODEL 'Hello' --kernel auto",
        ),
        Code(
            "AWQ-ROCM-014",
            "torch is not built for ROCm",
            "The ROCm backend is installed beside a torch for CUDA or for the CPU.",
            "Install torch for ROCm.",
            _TORCH,
        ),
        Code(
            "AWQ-ROCM-015",
            "The GPU reports waves of another size",
            "The driver's wave size is not that of the architecture that it names; mostly HSA_OVERRIDE_GFX_VERSION.",
            "Unset the variable; else update the driver.",
            "unset HSA_OVERRIDE_GFX_VERSION",
        ),
        Code(
            "AWQ-ROCM-016",
            "hip-python cannot be imported",
            "The Python package that calls the HIP runtime is missing or of another ROCm release.",
            "Install it.",
            "pip install hip-python",
        ),
        Code(
            "AWQ-ROCM-017",
            "The HIP runtime does not answer",
            "libamdhip64 cannot be loaded or asked.",
            "Install or update ROCm.",
            "rocminfo",
        ),
        Code(
            "AWQ-ROCM-018",
            "The HIP runtime is too old",
            "ROCm 6.0 is the oldest whose compiler knows the GPUs that the kernels are for.",
            "Update ROCm, or install a build of torch that brings a newer one.",
            _TORCH,
        ),
        Code(
            "AWQ-ROCM-019",
            "HSA_OVERRIDE_GFX_VERSION names another GPU",
            "ROCm is told of a GPU that is not there. Kernels here are compiled for the GPU as it is, so the variable "
            "makes wrong what would be right.",
            "Unset it.",
            "unset HSA_OVERRIDE_GFX_VERSION",
        ),
        Code(
            "AWQ-ROCM-020",
            "The HIP runtime refused a call",
            "The message says which call, and what the runtime answered.",
            "Run again alone on the GPU; if it comes back, report it with a bundle.",
            "awq-rt doctor --bundle report.zip --redact",
        ),
        Code(
            "AWQ-ROCM-021",
            "hipRTC failed",
            "AMD's run-time compiler aborted, hung or cannot be loaded. It runs in a process of its own.",
            "Install or update ROCm.",
            "rocminfo",
        ),
    ),
    "CPUs": (
        Code(
            "AWQ-CPU-001",
            "AWQ_RT_CPU_ISA cannot be had",
            "The variable asks for an instruction set that the processor lacks or that is not known.",
            "Unset it.",
            "unset AWQ_RT_CPU_ISA",
        ),
        Code(
            "AWQ-CPU-002",
            "AWQ_RT_CPU_INT8 cannot be had",
            "The instruction set in use has no kernels for 8-bit activations.",
            "Unset it.",
            "unset AWQ_RT_CPU_INT8",
        ),
        Code(
            "AWQ-CPU-010",
            "Not a CPU",
            "The CPU backend was asked to serve a GPU.",
            "Choose device='cpu'.",
            "awq-rt generate MODEL 'Hello' --device cpu",
        ),
        Code(
            "AWQ-CPU-011",
            "The CPU backend does not serve the dtype",
            "Its kernels compute with float32, float16 and bfloat16 activations.",
            "Choose one of them.",
            "awq-rt generate MODEL 'Hello' --device cpu --dtype float32",
        ),
        Code(
            "AWQ-CPU-012",
            "A linear has no input features",
            "A shape of 0 leaves nothing to multiply.",
            "Use the reference backend.",
            "awq-rt generate MODEL 'Hello' --backend reference",
        ),
        Code(
            "AWQ-REFERENCE-001",
            "The reference backend does not serve the dtype",
            "It computes with float32, float16 and bfloat16 activations.",
            "Choose one of them.",
            "awq-rt generate MODEL 'Hello' --dtype float32",
        ),
    ),
    "What only the doctor finds": (
        Code(
            "AWQ-CACHE-001",
            "The cache folder cannot be written",
            "Compiled kernels, and what was found out about plugins, cannot be kept: every process does it again.",
            "Give AWQ_RT_CACHE a folder that you can write.",
            "export AWQ_RT_CACHE=$HOME/.cache/awq_rt",
        ),
        Code(
            "AWQ-CACHE-002",
            "Others may write the cache folder",
            "Machine code in the cache is run. Who can write the folder can have his code run as you.",
            "Take the permission away.",
            "chmod -R go-w ${AWQ_RT_CACHE:-$HOME/.cache/awq_rt}",
        ),
        Code(
            "AWQ-ENV-001",
            "A debugging variable makes the GPU slow",
            "It makes the host wait for every kernel, or forbids what torch does to save memory and time.",
            "Unset it.",
            "unset CUDA_LAUNCH_BLOCKING AMD_SERIALIZE_KERNEL HIP_LAUNCH_BLOCKING PYTORCH_NO_CUDA_MEMORY_CACHING",
        ),
        Code(
            "AWQ-KERNEL-001",
            "A kernel computed wrong numbers",
            "Beside float64 its error is larger than rounding explains: a bug, a miscompilation, or failing hardware.",
            "Update driver and plugin; compare with another machine; report it with a bundle.",
            "awq-rt doctor --bundle report.zip --redact",
        ),
        Code(
            "AWQ-KERNEL-002",
            "A kernel did not end",
            "It was run in a process of its own, which was ended when the time was over.",
            "Look for other programs on the GPU, and at what the driver says; report it with a bundle.",
            "awq-rt doctor --bundle report.zip --redact",
        ),
        Code(
            "AWQ-KERNEL-003",
            "A kernel's result is not finite",
            "It holds NaN or infinity where the right result is finite.",
            "Update driver and plugin; report it with a bundle.",
            "awq-rt doctor --bundle report.zip --redact",
        ),
        Code(
            "AWQ-KERNEL-004",
            "A kernel took its process down",
            "It crashed, alone in a process of its own.",
            "Update driver and plugin; report it with a bundle.",
            "awq-rt doctor --bundle report.zip --redact",
        ),
        Code(
            "AWQ-KERNEL-005",
            "A kernel could not be run",
            "Packing a weight or calling the kernel raised an error, though the backend had agreed to serve it.",
            "Update driver and plugin; report it with a bundle.",
            "awq-rt doctor --bundle report.zip --redact",
        ),
        Code(
            "AWQ-KERNEL-006",
            "No kernel computed rightly",
            "Not one backend's own choice of kernels gave right results here, not even the reference.",
            "Reinstall torch; suspect memory or processor.",
            "pip install --force-reinstall torch awq-rt-reference",
        ),
        Code(
            "AWQ-MODEL-001",
            "The model does not fit",
            "Its weights, the cache of keys and values, and what packing needs for a moment exceed the memory.",
            "Use a smaller model, a shorter context, a larger device, or several.",
            "awq-rt generate MODEL 'Hello' --device cpu",
        ),
        Code(
            "AWQ-MODEL-002",
            "Some linears run on the reference",
            "The backend of the device refuses them, each with a reason; the reference is right and slow there.",
            "Use a checkpoint with sizes that the backend serves, or accept it.",
            "awq-rt doctor MODEL --json",
        ),
        Code(
            "AWQ-MODEL-003",
            "The weights are pickles",
            "They are read with weights_only=True, which runs no code; safetensors need no such care and load faster.",
            "Convert the checkpoint.",
            "awq-rt convert MODEL DESTINATION --to gemm",
        ),
        Code(
            "AWQ-MODEL-004",
            "The model could not be examined",
            "Opening it took the process down, hung, or raised something that is not one of awq_rt's errors.",
            "Report it; the checkpoint may be damaged.",
            _INSPECT,
        ),
        Code(
            "AWQ-DOCTOR-001",
            "A bug in the doctor",
            "The doctor itself failed; it says nothing about the machine.",
            "Report it with what it printed.",
            "awq-rt doctor --no-run",
        ),
    ),
}

CODES: Mapping[str, Code] = {code.code: code for family in _FAMILIES.values() for code in family}


def families() -> Mapping[str, tuple[Code, ...]]:
    """The codes by what they are about, in the order of the documentation."""
    return _FAMILIES
