"""Small models with the attributes of NVAE, VDVAE and hvae-oodd, written for these tests; each has an ancestral sampler
of its own.

`ancestral(noise)` takes standard normal noise, one tensor per layer from the top, and returns latents, their
log-density and the output parameters.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn


def log_normal(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return distributions.Normal(mean, std).log_prob(z).flatten(1).sum(1)


def perturb(model: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """Random parameters and batch norm statistics, so that every part of the model matters."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=g))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(scale * torch.randn(module.running_mean.shape, generator=g))
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=g) + 0.5)
    return model.eval()


# NVAE.


class NormedConv(nn.Conv2d):
    """Weight-normalised; keeps the weight it worked out as an attribute, with its history."""

    def __init__(self, *args, data_init=False, mask=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_weight_norm = nn.Parameter(self.weight.detach().flatten(1).norm(dim=1).log().reshape(-1, 1, 1, 1))
        self.data_init, self.init_done = data_init, False
        if mask:
            self.mask = torch.ones_like(self.weight.detach())
            self.mask[:, :, -1, -1] = 0
        self.weight_normalized = self.normalize_weight()

    def normalize_weight(self):
        weight = self.weight * self.mask if hasattr(self, "mask") else self.weight
        return self.log_weight_norm.exp() * weight / (weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) + 1e-5)

    def forward(self, x):
        if self.data_init and not self.init_done:
            raise AssertionError("would initialise itself anew")
        self.weight_normalized = self.normalize_weight()
        return F.conv2d(x, self.weight_normalized, self.bias, self.stride, self.padding, self.dilation, self.groups)


class SyncBatchNormSwish(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not x.is_cuda:
            raise ValueError("expected input tensor to be on GPU")
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0, self.eps)
        return y * torch.sigmoid(y)


class WrappedNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bn = nn.SyncBatchNorm(channels)

    def forward(self, x):
        return self.bn(x)


class NormSwishConv(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.upsample = stride == -1
        self.bn_act = SyncBatchNormSwish(cin)
        self.conv_0 = NormedConv(cin, cout, 3, stride=abs(stride), padding=1)

    def forward(self, x):
        x = self.bn_act(x)
        return self.conv_0(F.interpolate(x, scale_factor=2) if self.upsample else x)


class EluConv(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.upsample = stride == -1
        self.conv_0 = NormedConv(cin, cout, 3, stride=abs(stride), padding=1, data_init=True)

    def forward(self, x):
        x = F.elu(x)
        return self.conv_0(F.interpolate(x, scale_factor=2) if self.upsample else x)


class ConvNormSwish(nn.Module):
    def __init__(self, cin, cout, size, **kwargs):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(cin, cout, size, padding=size // 2, bias=False, **kwargs), SyncBatchNormSwish(cout)
        )

    def forward(self, x):
        return self.conv(x)


class Inverted(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        up = [nn.UpsamplingNearest2d(scale_factor=2)] if stride == -1 else []
        wide = 2 * cin
        self.conv = nn.Sequential(
            *up,
            WrappedNorm(cin),
            ConvNormSwish(cin, wide, 1),
            ConvNormSwish(wide, wide, 3, groups=wide, stride=abs(stride)),
            nn.Conv2d(wide, cout, 1, bias=False),
            WrappedNorm(cout),
        )

    def forward(self, x):
        return self.conv(x)


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.se = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels), nn.Sigmoid())

    def forward(self, x):
        return x * self.se(x.mean((2, 3)))[:, :, None, None]


class Cell(nn.Module):
    def __init__(self, cin, cout, cell_type, operation, use_se, count):
        super().__init__()
        self.cell_type, self.use_se = cell_type, use_se
        stride = {"down": 2, "up": -1, "normal": 1}[cell_type.split("_")[0]]
        skips = {
            1: nn.Identity,
            2: lambda: nn.Conv2d(cin, cout, 1, stride=2),
            -1: lambda: nn.Sequential(nn.Upsample(scale_factor=2), NormedConv(cin, cout, 1)),
        }
        self.skip = skips[stride]()
        kind = {"inverted": Inverted, "swish": NormSwishConv, "elu": EluConv}[operation]
        self._num_nodes = count
        self._ops = nn.ModuleList(kind(cin if i == 0 else cout, cout, stride if i == 0 else 1) for i in range(count))
        if use_se:
            self.se = SqueezeExcite(cout)

    def forward(self, s):
        skip = self.skip(s)
        for operation in self._ops[: self._num_nodes]:
            s = operation(s)
        return skip + 0.1 * (self.se(s) if self.use_se else s)


class Combiner(nn.Module):
    def __init__(self, left, right, out, cell_type):
        super().__init__()
        self.cell_type = cell_type
        self.conv = NormedConv(left + right if cell_type == "combiner_dec" else right, out, 1)

    def forward(self, left, right):
        return self.conv(torch.cat((left, right), 1)) if self.cell_type == "combiner_dec" else left + self.conv(right)


class Flow(nn.Module):
    """A shift by masked convolutions."""

    def __init__(self, channels):
        super().__init__()
        self.shift = NormedConv(channels, channels, 3, padding=1, mask=True)

    def forward(self, z, features):
        return z - 0.1 * self.shift(z), torch.zeros_like(z)


class Mixture:
    def __init__(self, logits):
        self.logit_probs = logits[:, : logits.shape[1] // 10]


class AutoEncoder(nn.Module):
    """An NVAE: `groups` latents of `latents` channels at each of `scales` resolutions, the coarsest first."""

    def __init__(
        self,
        scales=2,
        groups=2,
        *,
        flows=0,
        res_dist=True,
        use_se=False,
        dataset="cifar10",
        mixtures=2,
        operation="inverted",
        size=16,
        nodes=1,
    ):
        super().__init__()
        self.dataset, self.num_mix_output = dataset, mixtures
        self.res_dist, self.num_flows, self.latents = res_dist, flows, 3
        self.crop_output = dataset == "mnist"
        self.vanilla_vae = scales == groups == 1
        channels, size = (1, 32) if self.crop_output else (3, size)
        width, coarse = 4, size // 2**scales
        top = width * 2**scales
        cell = lambda cin, cout, kind: Cell(cin, cout, kind, operation, use_se, nodes)  # noqa: E731
        self.prior_ftr0 = nn.Parameter(torch.randn(top, coarse, coarse))
        self.z0_size = [self.latents, coarse, coarse]
        self.stem = NormedConv(channels, width, 3, padding=1)
        self.pre_process = nn.ModuleList([cell(width, 2 * width, "down_pre")])
        at, encoder, decoder = 2 * width, [], []
        for scale in range(scales):
            for group in range(groups):
                encoder.append(cell(at, at, "normal_enc"))
                if not (scale == scales - 1 and group == groups - 1):
                    encoder.append(Combiner(at, at, at, "combiner_enc"))
            if scale < scales - 1:
                encoder.append(cell(at, 2 * at, "down_enc"))
                at *= 2
        self.enc0 = nn.Sequential(nn.ELU(), NormedConv(at, at, 1), nn.ELU())
        enc_sampler, dec_sampler, flow_cells = [], [], []
        for scale in range(scales):
            for group in range(groups):
                enc_sampler.append(NormedConv(at, 2 * self.latents, 3, padding=1))
                flow_cells += [Flow(self.latents) for _ in range(flows)]
                if scale or group:
                    dec_sampler.append(nn.Sequential(nn.ELU(), NormedConv(at, 2 * self.latents, 1)))
                    decoder.append(cell(at, at, "normal_dec"))
                decoder.append(Combiner(at, self.latents, at, "combiner_dec"))
            if scale < scales - 1:
                decoder.append(cell(at, at // 2, "up_dec"))
                at //= 2
        self.enc_sampler, self.dec_sampler = nn.ModuleList(enc_sampler), nn.ModuleList(dec_sampler)
        self.nf_cells = nn.ModuleList(flow_cells)
        self.enc_tower = [] if self.vanilla_vae else nn.ModuleList(encoder)
        self.dec_tower = [] if self.vanilla_vae else nn.ModuleList(decoder)
        if self.vanilla_vae:
            self.stem_decoder = NormedConv(self.latents, at, 1)
        self.post_process = nn.ModuleList([cell(at, at // 2, "up_post")])
        out = {True: 1, False: 6 if mixtures == 1 else 10 * mixtures}[self.crop_output]
        self.image_conditional = nn.Sequential(nn.ELU(), NormedConv(at // 2, out, 3, padding=1))
        self.all_conv_layers = [module for module in self.modules() if isinstance(module, NormedConv)]

    def decoder_output(self, logits):
        if self.crop_output:
            return distributions.Bernoulli(logits=logits)
        if self.num_mix_output == 1:
            mean, log_std = logits.chunk(2, 1)
            return SimpleNamespace(
                dist=SimpleNamespace(mu=5 * torch.tanh(mean / 5), sigma=torch.exp(5 * torch.tanh(log_std / 5)) + 0.01)
            )
        return Mixture(logits)

    def ancestral(self, noise, prior_ready=lambda *_: None):
        """Written for a reader: one pass over the tower, each group's Gaussian from the features so far."""
        latents, log_density, noise = [], 0, list(noise)
        s = self.prior_ftr0[None].repeat(len(noise[0]), 1, 1, 1)

        def draw(parameters):
            nonlocal log_density
            mean, log_std = (5 * torch.tanh(part / 5) for part in parameters.chunk(2, 1))
            std = log_std.exp() + 0.01
            latents.append(mean + std * noise[len(latents)])
            log_density = log_density + log_normal(latents[-1], mean, std)
            return latents[-1]

        zeros = torch.zeros(len(s), 2 * self.latents, *self.z0_size[1:])
        for cell in self.dec_tower:
            if cell.cell_type == "combiner_dec":
                parameters = self.dec_sampler[len(latents) - 1](s) if latents else zeros
                s = cell(s, draw(parameters))
            else:
                s = cell(s)
        if self.vanilla_vae:
            s = self.stem_decoder(draw(zeros))
        for cell in self.post_process:
            s = cell(s)
        return latents, log_density, self.image_conditional(s)


# VDVAE.


class Block(nn.Module):
    def __init__(self, cin, middle, cout, residual=False, down=None):
        super().__init__()
        self.residual, self.down = residual, down
        self.c1, self.c2 = nn.Conv2d(cin, middle, 1), nn.Conv2d(middle, cout, 1)

    def forward(self, x):
        y = self.c2(F.gelu(self.c1(F.gelu(x))))
        y = x + y if self.residual else y
        return F.avg_pool2d(y, self.down) if self.down else y


class DecBlock(nn.Module):
    def __init__(self, width, zdim, base, mixin):
        super().__init__()
        self.base, self.mixin, self.zdim = base, mixin, zdim
        self.widths = {1: width, 4: width, 8: width, 16: width}
        self.enc = Block(2 * width, 4, 2 * zdim)
        self.prior = Block(width, 4, 2 * zdim + width)
        self.z_proj = nn.Conv2d(zdim, width, 1)
        self.z_fn = lambda z: self.z_proj(z)
        self.resnet = Block(width, 4, width, residual=True)


class VDVAE(nn.Module):
    """Latents at 1x1, 4x4 and 8x8, the last resolution without a bias of its own."""

    def __init__(self, width=8, zdim=2, dataset="cifar10"):
        super().__init__()
        self.H = SimpleNamespace(image_size=8, dataset=dataset, width=width)
        self.encoder = nn.Module()
        self.encoder.in_conv = nn.Conv2d(3, width, 3, padding=1)
        self.encoder.enc_blocks = nn.ModuleList(Block(width, 4, width, True, down) for down in (None, 2, None, 4))
        self.encoder.forward = self.encode
        self.decoder = nn.Module()
        self.decoder.dec_blocks = nn.ModuleList(
            DecBlock(width, zdim, *at) for at in ((1, None), (4, 1), (4, None), (8, 4), (8, None))
        )
        self.decoder.bias_xs = nn.ParameterList([nn.Parameter(torch.randn(1, width, size, size)) for size in (1, 4)])
        self.decoder.gain, self.decoder.bias = (
            nn.Parameter(torch.ones(1, width, 1, 1)),
            nn.Parameter(torch.zeros(1, width, 1, 1)),
        )
        self.decoder.out_net = nn.Module()
        self.decoder.out_net.out_conv = nn.Conv2d(width, 30, 1)

    def encode(self, x):
        assert x.shape[-1] == 3, "the encoder takes NHWC"
        x = self.encoder.in_conv(x.permute(0, 3, 1, 2))
        activations = {x.shape[2]: x}
        for block in self.encoder.enc_blocks:
            x = block(x)
            activations[x.shape[2]] = x
        return activations

    def ancestral(self, noise):
        xs = {bias.shape[2]: bias.repeat(len(noise[0]), 1, 1, 1) for bias in self.decoder.bias_xs}
        latents, log_density = [], 0
        for block, e in zip(self.decoder.dec_blocks, noise, strict=True):
            x = xs.get(block.base, torch.zeros(len(e), 8, block.base, block.base))
            if block.mixin:
                x = x + F.interpolate(xs[block.mixin], size=block.base)
            features = block.prior(x)
            mean, log_std, residual = (
                features[:, : block.zdim],
                features[:, block.zdim : 2 * block.zdim],
                features[:, 2 * block.zdim :],
            )
            latents.append(mean + log_std.exp() * e)
            log_density = log_density + log_normal(latents[-1], mean, log_std.exp())
            xs[block.base] = block.resnet(x + residual + block.z_fn(latents[-1]))
        return latents, log_density, self.decoder.out_net.out_conv(xs[8] * self.decoder.gain + self.decoder.bias)


# hvae-oodd.


class GaussianLayer(nn.Module):
    """Mean and std from features, or from the top prior's logits; for inference from other weights."""

    def __init__(self, width, shape, top):
        super().__init__()
        self.shape = shape
        self.q = nn.Linear(16 * width, 2 * math.prod(shape))
        if top:
            self.register_buffer("prior_logits", torch.zeros(2 * math.prod(shape)))
        else:
            self.p = nn.Linear(16 * width, 2 * math.prod(shape))

    def forward(self, x, inference, sample=True, n_prior_samples=1, **_):
        logits = (
            self.prior_logits.expand(n_prior_samples, -1)
            if x is None
            else (self.q if inference else self.p)(x.flatten(1))
        )
        mean, scale = (part.unflatten(1, self.shape) for part in logits.chunk(2, 1))
        dist = distributions.Normal(mean, F.softplus(scale, beta=math.log(2)))
        z = dist.rsample() if sample else None
        return z, SimpleNamespace(z=z, dist=dist)


class WithSkips(nn.Module):
    """Takes its skip input off the list that it is given, as the published module does."""

    def __init__(self, width, use_skips):
        super().__init__()
        self.layers, self.use_skips = (
            nn.ModuleList([nn.utils.weight_norm(nn.Conv2d(width, width, 3, padding=1))]),
            use_skips,
        )

    def forward(self, x, aux=None):
        x = x + aux.pop() if self.use_skips else x
        x = torch.tanh(self.layers[0](x))
        return x, [x]


class Project(nn.Module):
    def __init__(self, size, width):
        super().__init__()
        self.width, self.linear = width, nn.Linear(size, 16 * width)

    def forward(self, z):
        return self.linear(z.flatten(1)).unflatten(1, (self.width, 4, 4))


class Stage(nn.Module):
    """Of LVAE: one latent; the posterior merges the image's features with those from above."""

    def __init__(self, width, shape, top, skips):
        super().__init__()
        self.stochastic, self.p_projection = GaussianLayer(width, shape, top), Project(math.prod(shape), width)
        self.p_deterministic = WithSkips(width, skips and not top)

    def step(self, h, d, sample=True):
        q = self.stochastic(h if d is None else h + d, inference=True)[1]
        return q.z, [SimpleNamespace(q=q)]


class TwoLatentStage(nn.Module):
    """Of BIVA: a top-down and a bottom-up latent."""

    def __init__(self, width, shape, skips, conditional=True):
        super().__init__()
        self.td_stochastic, self.bu_stochastic = GaussianLayer(width, shape, False), GaussianLayer(width, shape, False)
        self.z_proj, self.condition = Project(2 * math.prod(shape), width), Project(math.prod(shape), width)
        self.bu_condition = (lambda z, aux: aux + self.condition(z)) if conditional else None
        self.p_deterministic = WithSkips(width, skips)

    def step(self, h, d):
        bottom_up, top_down = (layer(h + d, inference=True)[1] for layer in (self.bu_stochastic, self.td_stochastic))
        return torch.cat((top_down.z, bottom_up.z), 1), [SimpleNamespace(q=top_down), SimpleNamespace(q=bottom_up)]


class BernoulliLikelihood(nn.Module):
    """Draws a sample beside its mean."""

    def __init__(self, width):
        super().__init__()
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x_p, x=None):
        dist = distributions.Bernoulli(logits=self.head(x_p))
        return None if x is None else dist.log_prob(x).sum((1, 2, 3)), SimpleNamespace(
            samples=dist.sample(), mean=dist.mean
        )


class DeepVAE(nn.Module):
    """Stages bottom to top; images (N, 1, 2, 2), padded to 4x4."""

    def __init__(self, biva=False, skip_stochastic=True, width=4):
        super().__init__()
        self.lambda_init, self.n_latents, self.skip_stochastic, self.pad, self.unpad = (
            None,
            3,
            skip_stochastic,
            [1, 1, 1, 1],
            [-1, -1, -1, -1],
        )
        middle = (
            TwoLatentStage(width, (2, 4, 4), skip_stochastic)
            if biva
            else Stage(width, (2, 4, 4), False, skip_stochastic)
        )
        self.stages = nn.ModuleList(
            [Stage(width, (1, 4, 4), False, skip_stochastic), middle, Stage(width, (5,), True, skip_stochastic)]
        )
        self.encoder, self.likelihood = nn.Conv2d(1, width, 3, padding=1), BernoulliLikelihood(width)

    def shapes(self):
        return (
            [(5,), (2, 4, 4), (2, 4, 4), (1, 4, 4)]
            if hasattr(self.stages[1], "td_stochastic")
            else [(5,), (2, 4, 4), (1, 4, 4)]
        )

    def infer(self, x):
        return torch.tanh(self.encoder(F.pad(x, self.pad)))

    def generate(self, h, n_prior_samples):
        d, skips, datas = None, None, []
        for stage in reversed(self.stages):
            z, data = stage.step(h, d)
            datas += data
            d, skips = self.below(stage, z, skips)
        return self.likelihood(F.pad(d, self.unpad))[1], tuple(reversed(datas))

    def below(self, stage, z, skips):
        z = (stage.p_projection if hasattr(stage, "p_projection") else stage.z_proj)(z)
        return stage.p_deterministic(z, skips if self.skip_stochastic else None)

    def ancestral(self, noise):
        noise, latents, log_density, d, skips = list(noise), [], 0, None, None

        def draw(layer, x):
            nonlocal log_density
            dist = layer(x, inference=False, sample=False, n_prior_samples=len(noise[0]))[1].dist
            latents.append(dist.mean + dist.stddev * noise[len(latents)])
            log_density = log_density + dist.log_prob(latents[-1]).flatten(1).sum(1)
            return latents[-1]

        for stage in reversed(self.stages):
            if isinstance(stage, TwoLatentStage):
                top_down = draw(stage.td_stochastic, d)
                bottom_up = draw(stage.bu_stochastic, stage.bu_condition(top_down, aux=d) if stage.bu_condition else d)
                z = torch.cat((top_down, bottom_up), 1)
            else:
                z = draw(stage.stochastic, d)
            d, skips = self.below(stage, z, skips)
        return latents, log_density, self.likelihood.head(F.pad(d, self.unpad))
