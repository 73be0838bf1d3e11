"""How the page looks, and what its buttons do. It works without internet."""

import html
import io
from base64 import b64encode
from collections.abc import Iterator
from threading import Lock
from typing import Any

import gradio as gr
from PIL import Image

from japanese_stable_diffusion.page.album import Made, keep
from japanese_stable_diffusion.page.form import make_form
from japanese_stable_diffusion.page.line import (
    Failed,
    Finished,
    Job,
    Line,
    Maker,
    News,
    Progress,
    Stopped,
    Waiting,
)

_TITLE = "Japanese Stable Diffusion"
_HELLO = f"# {_TITLE}\n日本語の言葉から画像を作ります。 / Makes pictures from Japanese words."
_IDLE = "「描く」を押すと、ここに画像が現れます。 / Press “Paint”, and the picture appears here."
_FONTS = ["system-ui", "Hiragino Sans", "Yu Gothic UI", "Noto Sans CJK JP", "sans-serif"]
_THEME = gr.themes.Default(primary_hue="red", font=_FONTS, font_mono=["ui-monospace", "monospace"]).set(
    block_info_text_color="*neutral_600"
)
_STYLE = """
.news progress { width: 100%; height: 1rem; accent-color: var(--primary-500); }
.news .previews { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .5rem; }
.news .previews img { width: 100%; max-width: 32rem; margin: auto; border-radius: var(--radius-md); }
.news [role=alert] { color: #b91c1c; font-weight: 600; }
.dark .news [role=alert] { color: #fca5a5; }
.news p, .news pre, .made pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.news pre, .made pre { font-size: var(--text-sm); }
.grid-wrap.fixed-height { min-height: 0 !important; max-height: none !important; }
"""

Update = dict[gr.blocks.Block, Any]


class Page:
    """The page for one maker of pictures.

    Args:
        make: makes the pictures of a request.
        schema: the OpenAPI schema of its inputs.
    """

    def __init__(self, make: Maker, schema: dict[str, Any]) -> None:
        self._line = Line(make)
        self._jobs: dict[str | None, Job] = {}
        self._changing = Lock()
        with gr.Blocks(title=_TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as self._blocks:
            self._place(schema)
            self._connect()

    def launch(self, host: str, port: int) -> None:
        """Serve the page until `close`, in a thread of its own."""
        self._blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=_THEME,
            css=_STYLE,
        )

    def close(self) -> None:
        """Stop serving, and stop what is being made."""
        for job in self._jobs.values():
            self._line.leave(job)
        self._blocks.close(verbose=False)

    def _place(self, schema: dict[str, Any]) -> None:
        self._history = gr.State([])
        self._chosen = gr.State(None)
        gr.Markdown(_HELLO)
        with gr.Row():
            with gr.Column(scale=2, min_width=360):
                self._paint = gr.Button("描く / Paint", variant="primary", elem_id="paint", render=False)
                self._cancel = gr.Button(
                    "やめる / Cancel", variant="stop", elem_id="cancel", interactive=False, render=False
                )
                self._form = make_form(schema, [self._paint, self._cancel])
            with gr.Column(scale=3, min_width=360):
                self._news = gr.HTML(_paragraph(_IDLE), elem_id="news", elem_classes="news")
                self._gallery = gr.Gallery(
                    label="できた画像 / Pictures",
                    elem_id="pictures",
                    columns=2,
                    object_fit="contain",
                    interactive=False,
                    visible=False,
                    buttons=["download", "fullscreen"],
                )
                with gr.Column(visible=False) as self._details:
                    self._parameters = gr.HTML(elem_id="made", elem_classes="made")
                    with gr.Row():
                        self._again = gr.Button(
                            "このシードでもう一度 / Again with this seed", elem_id="again", size="md"
                        )
                        self._download = gr.DownloadButton(
                            "ダウンロード / Download", elem_id="download", size="md"
                        )
                self._album = gr.Gallery(
                    label="この訪問で作った画像 / Made during this visit",
                    elem_id="history",
                    columns=6,
                    allow_preview=False,
                    interactive=False,
                    visible=False,
                )

    def _connect(self) -> None:
        inputs = [self._history, *self._form.components]
        outputs = [
            *(self._news, self._paint, self._cancel, self._again),
            *(self._history, self._gallery, self._album),
            *(self._chosen, self._details, self._parameters, self._download),
        ]
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        # Gradio drops a click while the event of the click before hasn't ended, and that is a moment after
        # its last news, when the button can be pressed again already.
        pressed: dict[str, Any] = {**hidden, "trigger_mode": "multiple"}
        # Waiting is done in the line, where one can see it and leave it.
        painting: dict[str, Any] = {**pressed, "concurrency_limit": None}
        self._paint.click(self._make, inputs, outputs, **painting)
        seed, count = self._form.component("seed"), self._form.component("num_outputs")
        chosen: list[gr.components.Component] = [field for field in (seed, count) if field]
        self._again.click(
            lambda made: [str(made.seed), 1][: len(chosen)], self._chosen, chosen, queue=False, **pressed
        ).then(self._make, inputs, outputs, **painting)
        self._cancel.click(self._leave, queue=False, **hidden)
        self._blocks.unload(self._leave)
        details = [self._chosen, self._details, self._parameters, self._download, self._again]
        for gallery in (self._gallery, self._album):
            gallery.select(self._choose, self._history, details, queue=False, **hidden)

    def _make(self, request: gr.Request, history: list[Made], *values: Any) -> Iterator[Update]:
        inputs = self._form.read(values)
        with self._changing:
            job, before = self._line.join(inputs), self._jobs.get(request.session_hash)
            self._jobs[request.session_hash] = job
        if before:
            self._line.leave(before)
        is_busy: Update = {
            self._paint: gr.update(interactive=False),
            self._again: gr.update(interactive=False),
        }
        yield {self._cancel: gr.update(interactive=True), **is_busy}
        for news in job.news():
            if self._is_replaced(job, request):
                return
            if not isinstance(news, Finished):
                yield {self._news: _describe(news)}
                continue
            made = keep(news.files)
            history = [*made, *history]
            yield {
                self._news: _describe(news),
                self._history: history,
                self._gallery: gr.update(value=_captioned(made), selected_index=None, visible=True),
                self._album: gr.update(value=_captioned(history), selected_index=None, visible=True),
                **self._detail(made[0]),
            }
        if self._is_replaced(job, request):
            return
        is_idle: Update = {self._paint: gr.update(interactive=True), self._again: gr.update(interactive=True)}
        yield {self._cancel: gr.update(interactive=False), **is_idle}

    def _is_replaced(self, job: Job, request: gr.Request) -> bool:
        """Whether this visitor has begun something else, whose news are told by now."""
        return self._jobs.get(request.session_hash, job) is not job

    def _leave(self, request: gr.Request) -> None:
        with self._changing:
            job = self._jobs.pop(request.session_hash, None)
        if job:
            self._line.leave(job)

    def _choose(self, history: list[Made], event: gr.SelectData) -> Update:
        # Both galleries begin with the newest picture.
        return self._detail(history[event.index])

    def _detail(self, made: Made) -> Update:
        return {
            self._chosen: made,
            self._details: gr.update(visible=True),
            self._parameters: f"<pre>{html.escape(made.parameters)}</pre>",
            self._download: gr.update(value=made.file),
            self._again: gr.update(visible=made.seed is not None),
        }


def _captioned(pictures: list[Made]) -> list[tuple[str, str]]:
    return [(str(made.file), "" if made.seed is None else f"シード / seed {made.seed}") for made in pictures]


def _describe(news: News) -> str:
    """What a visitor hears, as HTML."""
    match news:
        case Waiting(0):
            return _paragraph("サーバーの手が空くのを待っています… / Waiting until the server is free …")
        case Waiting(ahead):
            return _paragraph(f"順番を待っています（前に {ahead} 件）… / Waiting in line, {ahead} ahead …")
        case Progress(total=0):
            return _paragraph("準備しています… / Getting ready …") + "<progress></progress>"
        case Progress(done, total, previews):
            images = "".join(f'<img alt="" src="{_data_url(preview)}">' for preview in previews)
            return (
                _paragraph(f"{done} / {total} ステップ / steps")
                + f'<progress value="{done}" max="{total}"></progress><div class="previews">{images}</div>'
            )
        case Finished(log=log):
            return _paragraph("できました / Done") + f"<pre>{html.escape(chr(10).join(log))}</pre>"
        case Failed(reason):
            return f'<p role="alert">{html.escape(reason)}</p>'
        case Stopped():
            return _paragraph("やめました / Cancelled")


def _paragraph(text: str) -> str:
    return f'<p role="status">{text}</p>'


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"
