"""Training steps as users of other libraries write them: timm, torchvision, transformers, and the published study's
configuration as a plain nn.Module. Eager or under torch.compile; bf16 by autocast, as they do."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablations.benchmarks.contest import Contender
from core.foreign.model import Foreign
from core.measure import peak_bytes
from core.model import Config
from core.vit import VitConfig


def timm(config: VitConfig) -> nn.Module:
    """timm's VisionTransformer."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=config.image,
        patch_size=config.patch,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp / config.width,
        num_classes=config.classes,
    )


def torchvision(config: VitConfig) -> nn.Module:
    """torchvision's VisionTransformer."""
    from torchvision.models import VisionTransformer

    c = config
    return VisionTransformer(c.image, c.patch, c.depth, c.heads, c.width, c.mlp, num_classes=c.classes)


def transformers(config: VitConfig) -> nn.Module:
    """Hugging Face's ViTForImageClassification, its logits alone."""
    from transformers import ViTConfig, ViTForImageClassification

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape: Any = ViTConfig(
                image_size=config.image,
                patch_size=config.patch,
                hidden_size=config.width,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                intermediate_size=config.mlp,
                hidden_dropout_prob=0.0,
            )
            shape.num_labels = config.classes
            self.model: Any = ViTForImageClassification(shape)

        def forward(self, images: Tensor) -> Tensor:
            return self.model(pixel_values=images).logits

    return Logits()


def published(config: VitConfig) -> nn.Module:
    """The 2023 study's model: LayerNorm after the patch embedding, attention in plain matrix products, dropout 0.1, a
    head of two layers on the class token."""
    D, h = config.width, config.heads

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            B, N, _ = x.shape
            q, k, v = (layer(x).view(B, N, h, D // h).transpose(1, 2) for layer in (self.q, self.k, self.v))
            weights = torch.softmax(q @ k.transpose(-2, -1) / (D // h) ** 0.5, dim=-1)
            return self.out((weights @ v).transpose(1, 2).reshape(B, N, D))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2, self.attention = nn.LayerNorm(D), nn.LayerNorm(D), Attention()
            self.mlp = nn.Sequential(nn.Linear(D, config.mlp), nn.GELU(), nn.Dropout(0.1), nn.Linear(config.mlp, D))
            self.drop = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.drop(self.attention(self.norm1(x)))
            return x + self.mlp(self.norm2(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Conv2d(3, D, config.patch, config.patch), nn.LayerNorm(D)
            self.token = nn.Parameter(torch.zeros(1, 1, D))
            self.positions = nn.Parameter(torch.zeros(1, (config.image // config.patch) ** 2 + 1, D))
            self.blocks = nn.Sequential(*(Block() for _ in range(config.depth)))
            layers = nn.Linear(D, D // 2), nn.GELU(), nn.Dropout(0.1), nn.Linear(D // 2, config.classes)
            self.head = nn.Sequential(nn.LayerNorm(D), *layers)

        def forward(self, images: Tensor) -> Tensor:
            x = self.norm(self.embed(images).flatten(2).transpose(1, 2))
            x = torch.cat((self.token.expand(len(x), -1, -1), x), dim=1) + self.positions
            return self.head(self.blocks(x)[:, 0])

    return Model()


PEERS: dict[str, Callable[[VitConfig], nn.Module]] = {
    "timm": timm,
    "torchvision": torchvision,
    "transformers": transformers,
    "published": published,
}


def contender(
    name: str, config: Config, batch: tuple[Tensor, Tensor], half: bool, compiled: bool, steps: int
) -> Contender:
    """The training loop around a peer's model, or around the module of others that ours trains. The published one reads
    loss and accuracy back after every step, as its code does."""
    images, labels = batch
    made = config.build(0) if isinstance(config, Foreign) else PEERS[name](config)
    model: Any = made.to(images.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def one() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            logits = forward(images)
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if name == "published":
            loss.item()
            (logits.argmax(1) == labels).sum().item()

    def run() -> None:
        for _ in range(steps):
            one()

    def peak() -> int:
        held = [(p.data, p.grad, *optimizer.state[p].values()) for p in model.parameters()]
        return peak_bytes(lambda *_: one(), held, batch, device=images.device)

    return Contender(run, peak)
