"""What libraries do by themselves and should not."""

from __future__ import annotations

import warnings

from babyllama_ds.engine import quirks


def test_only_known_noise_is_silenced() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        quirks.quiet_known_noise()
        for module, category in (
            ("deepspeed.comm", FutureWarning),
            ("deepspeed.comm", UserWarning),
            ("torch.distributed.c10d", FutureWarning),
            ("torch.nn.modules", FutureWarning),
        ):
            warnings.warn_explicit("text", category, "file.py", 1, module=module)
    assert [(one.category, one.filename) for one in caught] == [
        (UserWarning, "file.py"),
        (FutureWarning, "file.py"),
    ]
