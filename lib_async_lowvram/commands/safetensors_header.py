"""Moved to `lib_async_lowvram.safetensors_header`, since layers below this one read headers, too."""

from lib_async_lowvram.safetensors_header import HeaderError, TensorInfo, read_header, shown  # noqa: F401
