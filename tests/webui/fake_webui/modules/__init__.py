"""A double of the WebUI's `modules` package: the seams the extension uses, behaving as those of 1.10.1 do.

Written from observed behaviour; no code of the WebUI is in it. `tests/webui/test_contract.py` checks it against a checkout.
"""
