"""Compile the fused kernel for GPUs that are not here, and look at the machine code.

    python -m hvae_ebm_prior.chains.kernels.aot_check

prints a table and fails on register spills, on more than 64 registers (96 where a program has a whole row), on loads or
stores of states narrower than 128 bits, and on fused multiply-adds, which would round differently from the twin. It
needs Triton's wheel alone, which brings NVIDIA's assembler and disassembler, and no driver.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import fused
from .naive import LANES, SECTION

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Of a program of four or eight warps; programs with whole rows are so few that all fit with more.
MOST_REGISTERS, MOST_OF_ROWS = 64, 96
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 gradient": {"gradient": "bf16"},
    "float16 gradient": {"gradient": "fp16"},
    "two noises": {"PREVIOUS": True},
    "held": {"HELD": True},
    "limit, whole rows": {"LIMIT": fused.OWN.value},
    "limit, renewed": {"LIMIT": fused.OWN.value, "RENEWED": True},
    "limit, long rows": {"LIMIT": fused.GIVEN.value},
    "sums of long rows": {"kernel": fused.section_kernel},
    "noise alone": {"kernel": fused.noise_kernel},
}
# Of the kernels beside the update: accesses of 128 bits per vector of a thread, narrower ones, most registers. Sums are
# unrolled for AMD, where a lane may have 512 registers.
OTHERS = {"sums of long rows": (1, 2, 256), "noise alone": (1, 3, MOST_REGISTERS)}


@dataclass
class Report:
    """What was compiled, and what is wrong with it.

    Attributes:
        target: the GPU.
        variant: which options of the kernel.
        registers: vector registers per thread.
        spills: bytes of local memory, or registers that were spilled.
        wide: number of 128-bit loads and stores of global memory.
        narrow: number of narrower ones, but for single values that all elements of a program share.
        faults: what breaks a promise.
    """

    target: str
    variant: str
    registers: int = 0
    spills: int = 0
    wide: int = 0
    narrow: int = 0
    faults: list[str] = field(default_factory=list)


def compile_kernel(
    target: GPUTarget, gradient: str = "fp32", kernel: Any = fused.update_kernel, **constants: Any
) -> Any:
    """The compiled kernel, with pointers and row strides that are multiples of 16."""
    flags = {name: constants.get(name, 0) for name in ("LIMIT", "PREVIOUS", "HELD", "RENEWED")}
    own = flags["LIMIT"] == fused.OWN.value
    # Sums over lanes, or over the sections of rows of 150,000 elements.
    width = LANES if own or kernel is fused.section_kernel else 32
    floats = ("u_ptr", "next_ptr", "coefficients_ptr", "sums_ptr", "out_ptr")
    gradients = ("gradient_ptr", "renewed_ptr", "replaced_ptr")
    kinds = {
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(gradients, f"*{gradient}"),
        "key_ptr": "*i64",
        "step_ptr": "*i64",
        "held_ptr": "*u8",
        "reach": "fp32",
    }
    chosen = {
        "BLOCK": fused.LARGEST_BLOCK,
        "WIDTH": width,
        "LEVELS": width.bit_length() - 1,
        "SECTION": SECTION,
        **flags,
    }
    chosen = {name: value for name, value in chosen.items() if name in kernel.arg_names}
    kinds = {name: kinds.get(name, "constexpr" if name in chosen else "i32") for name in kernel.arg_names}
    aligned = [
        name
        for name, kind in kinds.items()
        if (kind.startswith("*") and name != "step_ptr") or name == "dim" or name.endswith("_stride")
    ]
    source = ASTSource(kernel, kinds, chosen, multiples_of_16([kernel.arg_names.index(name) for name in aligned]))
    options = fused.launch_options(bool(flags["PREVIOUS"]), own, target.warp_size)
    return triton.compile(source, target=target, options=options)


def multiples_of_16(places: list[int]) -> Any:
    """The attributes by which `ASTSource` takes arguments for multiples of 16; their form changed in Triton 3.3."""
    try:
        from triton.backends.compiler import AttrsDescriptor
    except ImportError:
        return {(place,): [["tt.divisibility", 16]] for place in places}
    return AttrsDescriptor.from_hints(dict.fromkeys(places, 16))


def inspect_nvidia(report: Report, compiled: Any) -> None:
    """Read registers and stack from the assembler's own account, and accesses from the disassembly."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump's account has another form than expected: {usage}")
    report.registers, report.spills = int(found[1]), int(found[2]) + int(found[3])
    accesses = re.findall(r"\b(?:LDG|STG)\.E(\.\w+)*", code)
    report.wide = accesses.count(".128")
    report.narrow = len(accesses) - report.wide
    if re.search(r"\b(?:LDL|STL)\b", code):
        report.faults.append("local memory is used")
    if re.search(r"fma\.rn\.f32", compiled.asm["ptx"]):
        report.faults.append("multiplications and additions are fused")


def inspect_amd(report: Report, compiled: Any) -> None:
    """Read registers and spills from the metadata of the assembly, and accesses from its text."""
    code = compiled.asm["amdgcn"]
    found = {
        name: int(value)
        for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", code)
    }
    report.registers, report.spills = found["vgpr_count"], found["vgpr_spill_count"] + found["sgpr_spill_count"]
    accesses = re.findall(r"(?:global|buffer)_(?:load|store)_(\w+)", code)
    report.wide = accesses.count("dwordx4")
    report.narrow = len(accesses) - report.wide


def check(name: str, variant: str) -> Report:
    """Compile one variant for one target and check it."""
    options, target = VARIANTS[variant], TARGETS[name]
    report = Report(name, variant)
    (inspect_amd if target.backend == "hip" else inspect_nvidia)(report, compile_kernel(target, **options))
    own = options.get("LIMIT") == fused.OWN.value
    threads = fused.launch_options("PREVIOUS" in options, own, target.warp_size)["num_warps"] * target.warp_size
    vectors = max(1, fused.LARGEST_BLOCK // (4 * threads))  # of 4 floats, per thread
    half = "gradient" in options
    wide = vectors * 4 if not half else vectors * 3 + vectors // 2
    # Key, sample, step and coefficients; a mask of bytes; with few elements per thread, a gradient of 16 bits.
    narrow = 7 + 2 * bool(options.get("HELD")) + (half and vectors == 1)
    most = MOST_OF_ROWS if own else MOST_REGISTERS
    if variant in OTHERS:
        per_vector, narrow, most = OTHERS[variant]
        wide = per_vector * vectors
    faults = {
        f"more than {most} registers": report.registers > most,
        "registers are spilled": report.spills > 0,
        f"expected {wide} accesses of 128 bits": report.wide < wide,
        f"expected at most {narrow} narrower accesses": report.narrow > narrow,
    }
    report.faults += [fault for fault, holds in faults.items() if holds]
    return report


def linkable() -> list[str]:
    """Targets that Triton can link for here; AMD's linker comes with Triton 3.3 and newer, before that with ROCm."""
    try:
        getattr(backends["amd"].compiler, "path_to_rocm_lld", str)()
    except Exception as error:  # Triton raises nothing more specific
        print(f"no AMD target: {error}", file=sys.stderr)
        return [name for name, target in TARGETS.items() if target.backend != "hip"]
    return list(TARGETS)


def main() -> int:
    """Check every variant for every target; returns 1 if a promise is broken."""
    reports = [check(name, variant) for name in linkable() for variant in VARIANTS]
    print("| target | variant | registers | spilled | 128-bit accesses | narrower | |\n|---|---|---|---|---|---|---|")
    for report in reports:
        counts = (report.registers, report.spills, report.wide, report.narrow)
        verdict = "; ".join(report.faults) or "ok"
        print("| " + " | ".join(str(cell) for cell in (report.target, report.variant, *counts, verdict)) + " |")
    return int(any(report.faults for report in reports))


if __name__ == "__main__":
    sys.exit(main())
