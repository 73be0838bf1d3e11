"""A weights folder as it was downloaded in 2022, made from one in today's layout."""

import json
import shutil
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file
from transformers import CLIPConfig

ATTENTION_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def write_2022_layout(today: Path, folder: Path) -> Path:
    """Pickles, old key names, `position_ids`, and a safety checker that flags nothing."""
    shutil.copytree(today / "scheduler", folder / "scheduler")
    shutil.copytree(today / "tokenizer", folder / "tokenizer")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / "tokenizer" / name).write_text("{}")
    for part, file in (
        ("text_encoder", "model"),
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
    ):
        tensors = load_file(today / part / f"{file}.safetensors")
        (folder / part).mkdir()
        shutil.copy(today / part / "config.json", folder / part)
        if part == "vae":
            for new, old in ATTENTION_NAMES.items():
                tensors = {
                    name.replace(f".{new}.", f".{old}.") if ".attentions." in name else name: tensor
                    for name, tensor in tensors.items()
                }
        if part == "text_encoder":
            tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        file = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(tensors, folder / part / file)
    checker = tiny_safety_checker()
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text(json.dumps(checker.config.to_dict()))
    tensors = {
        name.replace("vision_model.", "vision_model.vision_model.", 1): tensor
        for name, tensor in checker.state_dict().items()
    }
    tensors["vision_model.vision_model.embeddings.position_ids"] = torch.arange(50)[None]
    torch.save(tensors, folder / "safety_checker" / "pytorch_model.bin")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(FEATURE_EXTRACTOR))
    return folder


FEATURE_EXTRACTOR = {
    "feature_extractor_type": "CLIPFeatureExtractor",
    "crop_size": 224,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


def tiny_safety_checker() -> StableDiffusionSafetyChecker:
    """The real class, small and untrained, with thresholds that no picture reaches."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config={**vision, "patch_size": 32}, text_config=text, projection_dim=16)
    )
    # As initialised, all pictures look nearly the same to it.
    for parameter in checker.vision_model.parameters():
        parameter.data.mul_(10)
    checker.concept_embeds.data.normal_()
    checker.special_care_embeds.data.normal_()
    checker.concept_embeds_weights.data.fill_(2)
    checker.special_care_embeds_weights.data.fill_(2)
    return checker.eval()
