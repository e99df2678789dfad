"""The fused kernel in Triton's interpreter against its twin; run by test_kernels.py with TRITON_INTERPRET=1."""

import itertools

import torch

from hvae_ebm_prior.chains.kernels import langevin_update
from hvae_ebm_prior.chains.kernels.fused import fused_update


def inputs(n, dim, dtype):
    g = torch.Generator().manual_seed(n + dim)
    u, u_next, gradient = (torch.randn(n, dim, generator=g) for _ in range(3))
    return u, u_next.to(dtype), gradient.to(dtype), torch.rand(n, 4, generator=g)


def both(*tensors, **arguments):
    return [langevin_update(*tensors, **arguments, backend=backend) for backend in ("naive", "triton")]


def main():
    cases = 0
    shapes = [(1, 1), (3, 3), (2, 20), (1, 1023), (2, 1024), (2, 2500)]
    for (n, dim), dtype, previous in itertools.product(
        shapes, (torch.float32, torch.bfloat16, torch.float16), (False, True)
    ):
        key, step = torch.tensor([-(2**40) - 3, 17]), torch.tensor([2**31 + 5])
        a, b = both(*inputs(n, dim, dtype), key=key, step=step, stream=3, previous=previous)
        assert torch.equal(a, b), (n, dim, dtype, previous, (a - b).abs().max())
        cases += 1

    # Held elements, a NaN and an infinity.
    u, u_next, gradient, coefficients = inputs(3, 1500, torch.float32)
    gradient[1, 1234] = float("nan")
    gradient[2, 0] = float("inf")
    held = torch.arange(1500) % 3 == 0
    for arguments in ({}, {"held": held}):
        a, b = both(u, u_next, gradient, coefficients, key=torch.tensor([1, 0]), **arguments)
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), arguments
        assert torch.isfinite(b[0]).all()
        cases += 1

    # Any block size, part of the batch, and strided inputs: the same bits.
    u, u_next, gradient, coefficients = inputs(4, 200, torch.float32)
    key, step = torch.tensor([5, 0]), torch.tensor([1])
    whole = langevin_update(u, u_next, gradient, coefficients, key=key, step=step, backend="naive")
    for block in (16, 64, 512, 1024):
        assert torch.equal(fused_update(u, u_next, gradient, coefficients, key, step, 0, False, None, block), whole), (
            block
        )
        cases += 1
    part = langevin_update(
        u[2:], u_next[2:], gradient[2:], coefficients[2:], key=torch.tensor([5, 2]), step=step, backend="triton"
    )
    assert torch.equal(part, whole[2:])
    wide = torch.randn(4, 400)
    wide[:, 100:300] = u
    channels_last = gradient.reshape(4, 2, 10, 10).to(memory_format=torch.channels_last).flatten(1)
    transposed = gradient.t().contiguous().t()
    for strided in ((wide[:, 100:300], u_next, gradient), (u, u_next, transposed), (u, u_next, channels_last)):
        assert torch.equal(langevin_update(*strided, coefficients, key=key, step=step, backend="triton"), whole)
        cases += 1

    # As many dimensions as the largest VDVAE has; large blocks, as the interpreter runs programs one after the other.
    u, u_next, gradient, coefficients = inputs(1, 4_500_001, torch.bfloat16)
    expected = langevin_update(u, u_next, gradient, coefficients, key=key, step=step, backend="naive")
    assert torch.equal(fused_update(u, u_next, gradient, coefficients, key, step, 0, False, None, 2**20), expected)
    print(f"{cases + 2} cases are equal")


if __name__ == "__main__":
    main()
