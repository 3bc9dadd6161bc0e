"""`triptych store`; see engines.store.serving."""

from __future__ import annotations

from engines.store.serving import main

if __name__ == "__main__":
    main()
