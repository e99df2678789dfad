"""The fused kernel in Triton's interpreter against its twin; run by test_kernels.py with TRITON_INTERPRET=1."""

import itertools

import torch

from hvae_ebm_prior.chains.kernels import drawn_noise, fused, langevin_update


def inputs(n, dim, dtype):
    g = torch.Generator().manual_seed(n + dim)
    u, u_next, gradient = (torch.randn(n, dim, generator=g) for _ in range(3))
    return u, u_next.to(dtype), gradient.to(dtype), torch.rand(n, 4, generator=g)


def both(*tensors, **arguments):
    return [langevin_update(*tensors, **arguments, backend=backend) for backend in ("naive", "triton")]


def with_block(u, u_next, gradient, coefficients, key, step, block):
    out = torch.empty(u.shape)
    rest = (key, step, 0, 0, False, None, float("inf"), out, block)
    fused.fused_update(u, u_next, gradient, None, None, coefficients, *rest)
    return out


def launches(*tensors, **arguments):
    """How many kernels a fused update launches."""
    counted = []
    kernels = [fused.update_kernel, fused.section_kernel]
    originals = [kernel.run for kernel in kernels]
    for kernel, original in zip(kernels, originals, strict=True):
        kernel.run = lambda *a, run=original, **k: (counted.append(1), run(*a, **k))[1]
    langevin_update(*tensors, **arguments, backend="triton")
    for kernel, original in zip(kernels, originals, strict=True):
        kernel.run = original
    return len(counted)


def limits(cases):
    """A drift limit that binds for one sample, for none and for all; rows of one program and of several sections;
    renewed parts; results over the states they come from.
    """
    key, step = torch.tensor([3, 1]), torch.tensor([2])
    shapes = [(2, 1), (3, 20), (2, 1500), (1, 8192), (1, 8193), (2, 1200)]
    for (n, dim), dtype in zip(shapes, [torch.float32] * 5 + [torch.bfloat16], strict=True):
        u, u_next, gradient, coefficients = inputs(n, dim, dtype)
        coefficients = coefficients + 0.1
        gradient[0] *= 50
        parts = torch.randn(2, n, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
        length = (coefficients[:, 2:3] * gradient.float()).norm(dim=1)
        middle = ((length / coefficients[:, 3] / dim**0.25).sum() / 2).item() if n > 1 else 1.0
        for limit, renewed, previous in ((middle, None, False), (1e-3, tuple(parts), True), (1e6, tuple(parts), False)):
            settings = {"key": key, "step": step, "ahead": 4, "drift_limit": limit, "previous": previous}
            a, b = both(u, u_next, gradient, coefficients, renewed=renewed, **settings)
            assert torch.equal(a, b), (n, dim, dtype, limit, (a - b).abs().max())
            # Against plain double precision, so that both are not wrong alike.
            g = gradient.double() if renewed is None else gradient.double() + (parts[0].double() - parts[1].double())
            still = coefficients * torch.tensor([1.0, 1.0, 0.0, 1.0])
            drift = b.double() - langevin_update(u, u_next, gradient, still, **settings, backend="naive").double()
            expected = coefficients[:, 2:3].double() * g
            longest = limit * dim**0.25 * coefficients[:, 3].double()
            shorter = (longest / expected.norm(dim=1)).clamp(max=1)
            torch.testing.assert_close(
                drift, shorter[:, None] * expected, atol=2e-5 * (1 + expected.abs().max()), rtol=1e-4
            )
            place = u.clone()
            langevin_update(
                place, u_next, gradient, coefficients, renewed=renewed, out=place, backend="triton", **settings
            )
            assert torch.equal(place, a)
            cases += 1
        assert launches(u, u_next, gradient, coefficients, key=key, drift_limit=1.0) == (1 if dim <= 8192 else 2)
    assert launches(u, u_next, gradient, coefficients, key=key) == 1
    return cases


def main():
    cases = limits(0)
    shapes = [(1, 1), (3, 3), (2, 20), (1, 1023), (2, 1024), (2, 2500)]
    for (n, dim), dtype, previous in itertools.product(
        shapes, (torch.float32, torch.bfloat16, torch.float16), (False, True)
    ):
        key, step = torch.tensor([-(2**40) - 3, 17]), torch.tensor([2**31 + 5])
        a, b = both(*inputs(n, dim, dtype), key=key, step=step, stream=3, previous=previous)
        assert torch.equal(a, b), (n, dim, dtype, previous, (a - b).abs().max())
        cases += 1
        if dtype == torch.float32 and not previous:
            noise = [drawn_noise(key, step, 7, 3, n, dim, backend) for backend in ("naive", "triton")]
            assert torch.equal(*noise), (n, dim)
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
        assert torch.equal(with_block(u, u_next, gradient, coefficients, key, step, block), whole), block
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
    assert torch.equal(with_block(u, u_next, gradient, coefficients, key, step, 2**20), expected)
    print(f"{cases + 2} cases are equal")


if __name__ == "__main__":
    main()
