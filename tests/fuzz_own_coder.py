"""`make fuzz-own-coder N=100000`: the fuzzer of streams by our own range coder, as on a device."""

import importlib
import sys

if __name__ == "__main__":
    sys.modules["constriction"] = None  # type: ignore[assignment]
    sys.exit(importlib.import_module("tests.fuzz_bitstream").main())
