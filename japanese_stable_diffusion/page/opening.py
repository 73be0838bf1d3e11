"""Open the page, and clear up after it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from japanese_stable_diffusion.page.line import Maker


@contextlib.contextmanager
def open_page(host: str, port: int, server: str | None = None) -> Iterator[str]:
    """Serve the page as long as the context lasts; gives its address.

    Args:
        host: address to listen on.
        port: a free one.
        server: URL of a running container that is to make the pictures; None for the model in this process.

    Raises:
        ServerError: that container can't be used.
        WeightsError: there are no weights to load.
    """
    with tempfile.TemporaryDirectory(
        prefix="japanese-stable-diffusion-page-", ignore_cleanup_errors=True
    ) as folder:
        # All that visitors send and get goes away with the page, and Gradio may read no other folder.
        tempfile.tempdir = folder
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        make, schema = _maker(server)
        # Gradio looks at these variables when it is imported.
        from japanese_stable_diffusion.page.layout import Page

        page = Page(make, schema)
        page.launch(host, port)
        try:
            yield f"http://{'localhost' if host == '0.0.0.0' else host}:{port}"
        finally:
            page.close()
            tempfile.tempdir = None


def _maker(server: str | None) -> tuple[Maker, dict[str, Any]]:
    if server:
        from japanese_stable_diffusion.page.server import Server

        container = Server(server)
        return container.make, container.schema
    from japanese_stable_diffusion.page.model import Model

    model = Model()
    return model.make, model.schema
