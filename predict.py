"""The container's interface: loads the weights once, then makes pictures.

`cog build` reads this file without running it, so every `Input` is written with literals only. What is allowed
is decided in `japanese_stable_diffusion/request.py`.
"""

# Cog's reader knows neither joined strings nor `int | None`, and wants every `Input` called in the signature.
# ruff: noqa: B008, E501, UP006, UP035, UP045

import logging
from typing import List, Optional

from cog import BasePredictor, Input, Path
from cog.input import FieldInfo

from japanese_stable_diffusion.hub import download_if_wanted
from japanese_stable_diffusion.images import empty, output_folder, write_image
from japanese_stable_diffusion.pipeline import Figures, Picture, Pipeline
from japanese_stable_diffusion.progress import Progress
from japanese_stable_diffusion.provenance import Parameters
from japanese_stable_diffusion.request import Request
from japanese_stable_diffusion.safety import choose_checker, is_flagged, report
from japanese_stable_diffusion.speed import choose_device, choose_dtype, speed_up
from japanese_stable_diffusion.weights import WEIGHTS, find_weights, load_weights

log = logging.getLogger("japanese_stable_diffusion")


class Predictor(BasePredictor):
    """Japanese Stable Diffusion: a Japanese prompt becomes pictures."""

    def setup(self) -> None:
        """Load the weights, onto the GPU if there is one."""
        if not log.handlers:
            log.addHandler(logging.StreamHandler())
            log.setLevel(logging.INFO)
        device = choose_device()
        download_if_wanted(WEIGHTS / "japanese-stable-diffusion")
        weights = load_weights(find_weights(), device, choose_dtype(device), lazily=True)
        speed_up(weights)
        self.pipeline = Pipeline(weights)
        log.info(
            "weights: %s (%s)", f"{weights.manifest.name} {weights.manifest.version}".strip(), weights.folder
        )
        log.info("device: %s, %s", device, str(weights.dtype).removeprefix("torch."))
        self.checker = choose_checker(weights)
        self.outputs = output_folder()

    def healthcheck(self) -> bool:
        """Whether the model can still compute; Cog asks at every /health-check while no picture is being made."""
        return self.pipeline.can_compute()

    def predict(
        self,
        prompt: str = Input(
            description="描いてほしいもの。日本語で最大1000文字、空なら指定なし。(単語:1.3) で強め、[単語] で弱める。 / What to paint, in Japanese; up to 1000 characters, empty for anything. (word:1.3) strengthens, [word] weakens.",
            default="サラリーマン 油絵",
            max_length=1000,
        ),
        negative_prompt: str = Input(
            description="描いてほしくないもの。最大1000文字。 / What to keep out of the picture; up to 1000 characters.",
            default="",
            max_length=1000,
        ),
        width: int = Input(
            description="画像の幅（ピクセル）。幅×高さは最大786432。 / Width in pixels; width × height may be 786432 at most.",
            default=512,
            choices=[64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960, 1024],
        ),
        height: int = Input(
            description="画像の高さ（ピクセル）。幅×高さは最大786432。 / Height in pixels; width × height may be 786432 at most.",
            default=512,
            choices=[64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960, 1024],
        ),
        num_outputs: int = Input(
            description="作る画像の枚数。 / How many pictures to make.",
            default=1,
            ge=1,
            le=8,
        ),
        num_inference_steps: int = Input(
            description="ノイズ除去のステップ数。多いほど丁寧で遅い。 / Denoising steps; more are finer and slower.",
            default=20,
            ge=1,
            le=500,
        ),
        guidance_scale: float = Input(
            description="プロンプトに従う強さ。1なら誘導なし。 / How closely to follow the prompt; 1 is no guidance.",
            default=7.5,
            ge=1,
            le=20,
        ),
        scheduler: str = Input(
            description="ノイズ除去の方法。LCMは少ないステップ用に作られた重みやLoRA向けで、4から8ステップ、誘導は1から2。 / The method of denoising. LCM is for weights and LoRAs made for few steps: 4 to 8 of them, guidance 1 to 2.",
            default="DPMSolverMultistep",
            choices=[
                "DPMSolverMultistep",
                "PNDM",
                "DDIM",
                "KLMS",
                "K_EULER",
                "K_EULER_ANCESTRAL",
                "UniPC",
                "LCM",
            ],
        ),
        seed: Optional[int] = Input(
            description="乱数の種。同じ種なら同じ画像になる。空ならランダム。 / Random seed; the same seed gives the same picture. Leave empty for a random one.",
            default=None,
            ge=0,
            le=4294967295,
        ),
        image: Optional[Path] = Input(
            description="もとにする画像。幅と高さが512のままなら画像自身の大きさで、そうでなければその大きさを覆うように拡大・縮小し、中央を切り抜いて描き直す。 / A picture to start from. If width and height are left at 512 its own size is used, otherwise it is scaled to cover theirs and cropped in the middle.",
            default=None,
        ),
        prompt_strength: float = Input(
            description="もとの画像（image）を描き直す強さ。0ならそのまま、1ならほぼ最初から。 / How much of the picture (image) to change: 0 leaves it, 1 paints almost from nothing.",
            default=0.8,
            ge=0,
            le=1,
        ),
        mask: Optional[Path] = Input(
            description="画像（image）と同じ縦横比で、描き直す所を白、残す所を黒にした画像。 / A picture of the same shape as image: white is repainted, black is kept.",
            default=None,
        ),
        output_format: str = Input(
            description="画像ファイルの形式。pngは劣化なし、jpgとwebpは小さい。 / File format; png is lossless, jpg and webp are smaller.",
            default="png",
            choices=["png", "jpg", "webp"],
        ),
        output_quality: int = Input(
            description="jpgとwebpの画質。高いほどきれいで大きい。pngには関係しない。 / Quality of jpg and webp; higher is finer and larger. Does not matter for png.",
            default=90,
            ge=0,
            le=100,
        ),
        variation_seed: Optional[int] = Input(
            description="variation_strengthで混ぜる、もう一つの乱数の種。空ならランダム。 / A second random seed, which variation_strength blends in. Leave empty for a random one.",
            default=None,
            ge=0,
            le=4294967295,
        ),
        variation_strength: float = Input(
            description="variation_seedの画像に近づける割合。0.1なら少しだけ違う画像、1なら別の画像になる。 / How far to go towards the picture of variation_seed: 0.1 is a slight variation, 1 another picture.",
            default=0,
            ge=0,
            le=1,
        ),
        lora: Optional[Path] = Input(
            description="この予測だけに使うLoRA（safetensors）。 / A LoRA (safetensors) for this prediction only.",
            default=None,
        ),
        lora_scale: float = Input(
            description="LoRAの効き具合。1が学習どおり、0なら効かない。 / How strongly to apply the LoRA; 1 is as trained, 0 not at all.",
            default=1,
            ge=0,
            le=5,
        ),
        second_pass: bool = Input(
            description="長い辺が768を超える画像を、小さく作ってから拡大して描き直す。同じものが繰り返されるのを防ぐ。本物の重みだけで、もとの画像（image）がないときに働く。 / Make pictures of more than 768 pixels on the longer side small first, then enlarge and repaint them, so that motifs do not repeat. With the real weights only, and without image.",
            default=True,
        ),
        go_fast: bool = Input(
            description="速く作る。言葉の効きが小さい所の誘導と、あまり変わらない計算を省く。画像は少し変わる。 / Go fast: leave out guidance where it does little, and computing that hardly changes. Pictures differ a little.",
            default=False,
        ),
    ) -> List[Path]:
        """Make the pictures; picture i is the one that seed + i makes alone. They stay until the next call."""
        given = {name: value for name, value in locals().items() if name != "self"}
        # Called from Python instead of through Cog, what was left out is still the Input itself.
        inputs = {
            name: value.default if isinstance(value, FieldInfo) else value for name, value in given.items()
        }
        request = Request(**inputs).with_seed()
        log.info("seed: %d", request.seed)
        if request.variation_strength:
            log.info("variation_seed: %d", request.variation_seed)
        manifest = self.pipeline.weights.manifest
        figures = Figures()
        # By the time that Cog asks for the next prediction, it has delivered the files of the last.
        empty(self.outputs.name)
        paths = []
        with Progress() as progress:
            for event in self.pipeline.generate(request, figures):
                if isinstance(event, Picture):
                    if self.checker and is_flagged(event.image, self.checker):
                        continue
                    path = Path(self.outputs.name) / f"output.{event.index}.{request.output_format}"
                    parameters = Parameters(
                        event.request, manifest.name, manifest.version, lora_hash=event.lora_hash
                    )
                    write_image(event.image, path, parameters, event.start)
                    paths.append(Path(path))
                else:
                    progress.show(event.index, event.total)
        for name, value in vars(figures).items():
            self.record_metric(name, value)
        report(request.num_outputs - len(paths), request.num_outputs)
        return paths
