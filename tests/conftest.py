"""A tiny model in the layout of a weights folder, and data and a judge of simple shapes."""

from pathlib import Path

import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from drawn_shards import write_drawn_shards
from transformers import CLIPTextConfig, CLIPTextModel

from japanese_stable_diffusion.training.judge import train_judge
from japanese_stable_diffusion.training.shards import Shards
from japanese_stable_diffusion.weights import Weights, load_weights

SENTENCES = [
    "サラリーマン 油絵",
    "富士山と桜の浮世絵",
    "猫が寿司を食べる水墨画",
    "東京タワーの夜景 ネオン 雨",
    "がらすの城 ぱんだ びわ湖",
    "cyberpunk city abcdefghijklmnopqrstuvwxyz",
    "0123456789 年の写真",
]


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder in today's layout: every class is the real one, only small and untrained."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    (folder / "tokenizer").mkdir(parents=True)
    pieces = train_tokenizer(folder / "tokenizer" / "spiece.model")
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=pieces,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=3,
        )
    )
    # As initialised, embeddings are so alike that a wrong id would hardly show in a picture.
    text_encoder.get_input_embeddings().weight.data.mul_(50)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    unet.conv_out.weight.data.mul_(4)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )
    vae.decoder.conv_out.weight.data.mul_(4)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for name, part in (
        ("text_encoder", text_encoder),
        ("unet", unet),
        ("vae", vae),
        ("scheduler", scheduler),
    ):
        part.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def weights(tiny_weights: Path) -> Weights:
    """The tiny model, loaded."""
    return load_weights(tiny_weights, torch.device("cpu"), torch.float32)


def train_tokenizer(path: Path) -> int:
    """Write a small `spiece.model` with the special pieces of 2022, and return its number of pieces."""
    with path.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 20),
            model_writer=model,
            vocab_size=300,
            hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc",
            bos_id=0,
            unk_id=1,
            eos_id=2,
            pad_id=3,
            pad_piece="[PAD]",
            control_symbols=["[CLS]", "[SEP]", "[MASK]"],
            minloglevel=2,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()


@pytest.fixture(scope="session")
def drawn_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards of simple shapes."""
    folder = tmp_path_factory.mktemp("drawn") / "data"
    write_drawn_shards(folder)
    return folder


@pytest.fixture(scope="session")
def drawn(drawn_folder: Path) -> Shards:
    """Shards of simple shapes, opened."""
    return Shards(drawn_folder)


@pytest.fixture(scope="session")
def judge_folder(drawn_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge that was trained on the simple shapes."""
    folder = tmp_path_factory.mktemp("judge")
    train_judge(drawn_folder, folder, epochs=40)
    return folder
