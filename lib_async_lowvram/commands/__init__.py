"""What `python -m lib_async_lowvram` can do: each command in a module of its own, which `__main__` asks to add its parser."""
