"""`python -m speechtx` is the same as `speechtx`."""

import sys

from speechtx.bin.main import main

sys.exit(main())
