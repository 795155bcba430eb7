"""Compiles every Triton kernel without a device: `python tests/ops/compile_triton.py`.

With Triton itself to PTX and machine code for an NVIDIA GPU; where triton-ascend is installed (in an environment of its
own, with pybind11 and any torch), down to linalg and HIVM, from which CANN makes an NPU's code.
"""

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_npu_irv2.ops import _triton

HALF, FLOAT, BYTE = '*fp16', '*fp32', '*u8'
CONSTANTS = {'eps': 'fp32', 'scale': 'fp32'}
PARAMETERS = dict(weight=FLOAT, bias=FLOAT, **CONSTANTS)
STATISTICS, GRADIENTS = dict(mean=FLOAT, variance=FLOAT), dict(grad_weight=FLOAT, grad_bias=FLOAT)
ROWS, TILE, SPANS = dict(block_c=1, block_s=2048), dict(block_c=64, block_s=32), dict(block_c=16, block_n=128)
# {kernel: (types of its arguments, int32 for those left out; sizes of its blocks)}
KERNELS = {
    '_moments': (dict(x=HALF, sums=FLOAT), ROWS),
    '_statistics': (
        dict(x=HALF, sums=FLOAT, running_mean=FLOAT, running_var=FLOAT, momentum='fp32', **STATISTICS),
        dict(tracks=True, **SPANS),
    ),
    '_normalize_relu': (dict(x=HALF, out=HALF, **STATISTICS, **PARAMETERS), TILE),
    '_gradient_sums': (dict(grad=HALF, x=HALF, sums=FLOAT, **STATISTICS, **PARAMETERS), TILE),
    '_parameter_gradients': (dict(sums=FLOAT, **GRADIENTS), SPANS),
    '_input_gradient': (dict(grad=HALF, x=HALF, grad_x=HALF, **GRADIENTS, **STATISTICS, **PARAMETERS), TILE),
    '_scaled_residual_relu': (dict(x=HALF, branch=HALF, out=HALF, scale='fp32'), dict(block=1024)),
    '_scaled_residual_relu_backward': (
        dict(grad=HALF, out=HALF, grad_x=HALF, grad_branch=HALF, scale='fp32'), dict(block=1024),
    ),
    '_normalize_images': (dict(images=BYTE, mean=FLOAT, std=FLOAT, out=HALF), dict(block=1024)),
}


def source(name: str) -> ASTSource:
    kernel = getattr(_triton, name)
    types, blocks = KERNELS[name]
    signature = {argument: 'constexpr' if argument in blocks else types.get(argument, 'i32')
                 for argument in kernel.arg_names}
    return ASTSource(kernel, signature, blocks)


def for_nvidia(name: str) -> str:
    compiled = triton.compile(source(name), target=GPUTarget('cuda', 90, 32))
    return f"{len(compiled.asm['ptx'])} bytes of PTX, {len(compiled.asm['cubin'])} of machine code"


def for_ascend(name: str) -> str:
    from triton._C.libtriton import ir  # noqa: PLC0415 - these exist beside triton-ascend only
    from triton.backends.ascend import compiler  # noqa: PLC0415

    backend = compiler.AscendBackend(GPUTarget('npu', 'Ascend910B3', 0))
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source(name).make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = {'hash': name, **vars(options)}
    lowered = compiler.ttir_to_linalg(compiler.make_ttir(module, metadata, options), metadata, options, named_ops=True)
    return f"{len(lowered)} bytes, {lowered.count('linalg.')} × linalg, {lowered.count('hivm.')} × HIVM"


if __name__ == '__main__':
    lower = for_ascend if 'ascend' in backends else for_nvidia
    for kernel_name in KERNELS:
        print(f'{kernel_name}: {lower(kernel_name)}', flush=True)
