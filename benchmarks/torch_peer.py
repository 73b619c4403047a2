"""The peer of `real_size`: diffusers' transformer in Flow-GRPO's loops, on torch.

The SDE step and its log-prob are those of arXiv 2505.05470, equations 9 and 10, written
here once more for torch: sampling appends, learning goes step by step with gradients
added up over one optimizer step, the reference is the adapter switched off.
"""

import math
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

NOISE_LEVEL = 0.7
# The eight joint-attention projections.
TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
]


def machine() -> str:
    if torch.cuda.is_available():
        return f"torch {torch.__version__} on {torch.cuda.get_device_name()}"
    return f"torch {torch.__version__} on one thread"


def make(size: Any, guidance: float, beta: float) -> dict[str, "Peer"]:
    """The eager peer and, on a GPU, the compiled one."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        return {"eager": Peer(size, guidance, beta, "cpu", torch.float32)}
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_flash_sdp(False)
    made = {
        name: Peer(size, guidance, beta, "cuda", torch.bfloat16)
        for name in ("eager", "compiled")
    }
    compiled = made["compiled"]
    compiled.ask = torch.compile(compiled.ask, mode="max-autotune-no-cudagraphs")
    return made


class Peer:
    """A transformer with random weights and a LoRA, and one group to learn from."""

    def __init__(self, size, guidance, beta, device, dtype):
        torch.manual_seed(0)
        given = {k: v for k, v in size.transformer.items() if k[0] != "_"}
        with torch.device(device):
            self.network = SD3Transformer2DModel(**given).to(dtype)
            self.network.add_adapter(
                LoraConfig(
                    r=size.rank, lora_alpha=2 * size.rank, target_modules=TARGETS
                )
            )
            width = given["joint_attention_dim"], given["pooled_projection_dim"]
            count = size.microbatch
            self.context = torch.randn(2 * count, size.tokens, width[0]).to(dtype)
            self.pooled = torch.randn(2 * count, width[1]).to(dtype)
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6)
        self.size, self.guidance, self.beta = size, guidance, beta
        self.device, self.dtype = device, dtype
        self.ask = self.network
        steps = torch.linspace(1.0, 1.0 / size.steps, size.steps)
        shifted = 3.0 * steps / (1 + 2.0 * steps)
        self.sigmas = [*shifted.tolist(), 0.0]
        self.shape = (size.microbatch, 16, size.side, size.side)
        self.gap = None

    def velocity(self, latents, sigma):
        """Guided, as one doubled batch."""
        doubled = torch.cat([latents, latents]).to(self.dtype)
        time = torch.full((len(doubled),), 1000.0 * sigma, device=self.device)
        with torch.autocast(self.device, self.dtype, self.dtype != torch.float32):
            made = self.ask(
                hidden_states=doubled,
                encoder_hidden_states=self.context,
                pooled_projections=self.pooled,
                timestep=time,
                return_dict=False,
            )[0]
        without, wanted = made.float().chunk(2)
        return without + self.guidance * (wanted - without)

    def step(self, latents, velocity, number, following=None):
        """(next latents, log-probs, means, std) of a Flow-SDE step."""
        sigma, after = self.sigmas[number : number + 2]
        below = sigma if sigma < 1 else self.sigmas[1]
        diffusion = NOISE_LEVEL * math.sqrt(sigma / (1 - below))
        pull, dt = diffusion**2 / (2 * sigma), after - sigma
        mean = latents * (1 + pull * dt) + velocity * (1 + pull * (1 - sigma)) * dt
        std = diffusion * math.sqrt(-dt)
        if following is None:
            following = mean + std * torch.randn_like(mean)
        square = (following.detach() - mean) ** 2 / (2 * std**2)
        log_prob = -square - math.log(std) - math.log(math.sqrt(2 * math.pi))
        return following, log_prob.mean(dim=(1, 2, 3)), mean, diffusion

    def forward(self):
        with torch.no_grad():
            made = self.velocity(torch.ones(self.shape, device=self.device), 0.5)
        self.wait()
        return made

    def rollout(self):
        """All steps of the group, a microbatch after the other."""
        self.kept = []
        with torch.no_grad():
            for _ in range(self.size.group // self.size.microbatch):
                latents = torch.randn(self.shape, device=self.device)
                for number in range(self.size.steps):
                    velocity = self.velocity(latents, self.sigmas[number])
                    following, log_prob, *_ = self.step(latents, velocity, number)
                    self.kept.append((number, latents, following, log_prob))
                    latents = following
        self.wait()

    def update(self):
        """One optimizer step of PPO with the KL to the base, all steps but the last."""
        gap, first = 0.0, self.gap is None
        for number, latents, following, old in self.kept:
            if number + 1 == self.size.steps:
                continue
            velocity = self.velocity(latents, self.sigmas[number])
            _, log_prob, mean, diffusion = self.step(
                latents, velocity, number, following
            )
            with torch.no_grad():
                self.network.disable_adapters()
                fixed = self.velocity(latents, self.sigmas[number])
                _, _, base, _ = self.step(latents, fixed, number, following)
                self.network.enable_adapters()
            ratio = torch.exp(log_prob - old)
            advantage = torch.linspace(-1, 1, len(ratio), device=self.device)
            clipped = torch.clamp(ratio, 1 - 1e-4, 1 + 1e-4)
            policy = torch.maximum(-advantage * ratio, -advantage * clipped).mean()
            distance = ((mean - base) ** 2).mean() / (2 * diffusion**2)
            (policy + self.beta * distance).backward()
            if first:
                gap = max(gap, float((log_prob.detach() - old).abs().max()))
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.wait()
        if first:
            self.gap = gap

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
