"""Which Einsums share a kernel, how each kernel is tiled, and what that costs; no kernel is built here."""
