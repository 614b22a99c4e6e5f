"""The frozen models of a diffusers SD3 folder: VAE, two CLIP text encoders and T5.

Text conditions equal those of ``StableDiffusion3Pipeline.encode_prompt``. Both kinds of input run
in calls of one fixed size (the last one filled up and cut): the bits of a result then depend on the
sample alone, not on who else was encoded with it, so runs of another layout, or resumed with a cold
cache, see the same data.

Legend: B samples, H/W pixels or latent cells, C channels, T text tokens, E text width, V pooled
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from soar_mega.data.libraries import quiet_libraries
from soar_mega.data.model_folder import ENCODERS, FolderError, ModelFacts, check_folder
from soar_mega.passes import TextCondition

_PROMPTS_AT_ONCE = 8
# On a CPU a larger call is no faster per picture; on a GPU one small picture does not fill it.
_IMAGES_AT_ONCE = {"cpu": 1}
_IMAGES_AT_ONCE_ELSEWHERE = 8


class FrozenEncoders(ModelFacts):
    """VAE and text encoders, without gradient, and the facts about them.

    Args:
        facts: Of the folder that the models are from.
        vae: ``AutoencoderKL``; runs in its own dtype (fp32 when loaded here).
        text_encoders: CLIP-L, CLIP-G, and T5 or None.
        tokenizers: One for each, same order.
        device: Where the models are and results go.
    """

    def __init__(
        self,
        facts: ModelFacts,
        vae: Any,
        text_encoders: Sequence[Any],
        tokenizers: Sequence[Any],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(**vars(facts))
        self.device = torch.device(device)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.clips = [m.to(self.device).eval().requires_grad_(False) for m in text_encoders[:2]]
        t5 = text_encoders[2] if len(text_encoders) > 2 else None
        self.t5 = None if t5 is None else t5.to(self.device).eval().requires_grad_(False)
        self.tokenizers = list(tokenizers)
        self.dtype: torch.dtype = self.clips[0].dtype

    @staticmethod
    def load(
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> FrozenEncoders:
        """Load from a diffusers folder; safetensors only, nothing is fetched.

        Args:
            folder: The pipeline's folder.
            device: Where to compute.
            dtype: Of the text encoders and their results; the VAE always runs in fp32.

        Raises:
            FolderError: See ``check_folder``; or a component that does not load.
        """
        classes, facts = check_folder(folder), ModelFacts.read(folder)
        # Seconds to import, and only this function needs them.
        import diffusers
        import transformers

        quiet_libraries()
        root = Path(folder).expanduser()
        lead = f"model.pretrained={str(folder)!r}: "
        loaded: dict[str, Any] = {}
        for part, name in classes.items():
            if part in ("transformer", "scheduler"):
                continue
            kind = getattr(diffusers if part == "vae" else transformers, name, None)
            if kind is None:
                raise FolderError(f"{lead}model_index.json: unknown class {name!r} of {part}")
            options = {"use_safetensors": True} if part in ENCODERS else {}
            try:
                loaded[part] = kind.from_pretrained(root / part, local_files_only=True, **options)
            except Exception as error:  # they raise nearly anything on a damaged folder
                raise FolderError(f"{lead}{part} does not load as {name}: {error}") from error
            if part in ENCODERS:
                loaded[part].to(torch.float32 if part == "vae" else dtype)
        suffixes = ("", "_2", "_3")
        return FrozenEncoders(
            facts,
            loaded["vae"],
            [loaded.get(f"text_encoder{s}") for s in suffixes],
            [loaded.get(f"tokenizer{s}") for s in suffixes],
            device=device,
        )

    @torch.no_grad()
    def encode_images(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and (clamped) log-variance of the VAE's posterior, raw, fp32 (B, C, H/f, W/f) each.

        Args:
            pixels_B3HW: fp32 in [-1, 1], on any device.
        """
        size = _IMAGES_AT_ONCE.get(self.device.type, _IMAGES_AT_ONCE_ELSEWHERE)
        means: list[Tensor] = []
        logvars: list[Tensor] = []
        for start in range(0, len(pixels_B3HW), size):
            part = pixels_B3HW[start : start + size].to(self.device, self.vae.dtype)
            count = len(part)
            if count < size:
                part = torch.cat([part, part[-1:].expand(size - count, -1, -1, -1)])
            posterior = self.vae.encode(part).latent_dist
            means.append(posterior.mean[:count].float())
            logvars.append(posterior.logvar[:count].float())
        return torch.cat(means), torch.cat(logvars)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int) -> TextCondition:
        """What ``StableDiffusion3Pipeline.encode_prompt`` gives for these prompts.

        Args:
            prompts: At least one.
            max_sequence_length: Number of T5 tokens; each CLIP gives its tokenizer's
                ``model_max_length``.

        Returns:
            Text (B, CLIP tokens + T5 tokens, E) and pooled (B, V) in the encoders' dtype.
        """
        texts: list[Tensor] = []
        pooled: list[Tensor] = []
        for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
            part = list(prompts[start : start + _PROMPTS_AT_ONCE])
            count = len(part)
            part += [part[-1]] * (_PROMPTS_AT_ONCE - count)
            text_BTE, pooled_BV = self._encode_prompts(part, max_sequence_length)
            texts.append(text_BTE[:count])
            pooled.append(pooled_BV[:count])
        return TextCondition(torch.cat(texts), torch.cat(pooled))

    def _encode_prompts(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        hidden: list[Tensor] = []
        pooled: list[Tensor] = []
        for tokenizer, clip in zip(self.tokenizers, self.clips, strict=False):
            ids_BT = self._tokens(tokenizer, prompts, self.clip_tokens)
            out = clip(ids_BT, output_hidden_states=True)
            hidden.append(out.hidden_states[-2].to(self.dtype))
            pooled.append(out[0].to(self.dtype))
        clip_BTE = torch.cat(hidden, dim=-1)
        if self.t5 is None:
            t5_BTE = clip_BTE.new_zeros(len(prompts), length, self.text_width)
        else:
            ids_BT = self._tokens(self.tokenizers[2], prompts, length, add_special_tokens=True)
            t5_BTE = self.t5(ids_BT)[0].to(self.dtype)
        clip_BTE = pad(clip_BTE, (0, t5_BTE.shape[-1] - clip_BTE.shape[-1]))
        return torch.cat([clip_BTE, t5_BTE], dim=1), torch.cat(pooled, dim=-1)

    def _tokens(self, tokenizer: Any, prompts: list[str], length: int, **options: bool) -> Tensor:
        tokens = tokenizer(
            prompts,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
            **options,
        )
        ids_BT: Tensor = tokens.input_ids
        return ids_BT.to(self.device)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Latents as the transformer sees them to fp32 pixels (B, 3, H, W), clamped to [-1, 1]."""
        raw_BCHW = latents_BCHW.to(self.device) / self.scaling_factor + self.shift_factor
        pixels_B3HW: Tensor = self.vae.decode(raw_BCHW.to(self.vae.dtype)).sample
        return pixels_B3HW.float().clamp(-1, 1)


def sample_latents(mean_BCHW: Tensor, logvar_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """A draw from the VAE's posterior, raw latents."""
    return mean_BCHW + torch.exp(0.5 * logvar_BCHW) * noise_BCHW
