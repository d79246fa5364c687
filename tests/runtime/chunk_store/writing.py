"""A process that uses a folder of chunks, as others do at the same time: ``python -m ... FOLDER LIMIT SEED SECONDS``.

Whatever it reads has to be what belongs to the key; what is there in all has to be within the limit, and one block.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from mesart.runtime.chunk_store.folder import ChunkFolder
from tests.runtime.chunk_store.blocks import LAYOUT, block_of, bytes_on_disk, key_of, same

BLOCKS = [block_of(index, 20 + index) for index in range(40)]


def main(folder: Path, limit: int, seed: int, seconds: float) -> None:
    """Prints ``ready`` once the folder is open, and in the end how many blocks were read."""
    store, choose = ChunkFolder(folder, limit), random.Random(seed)
    print("ready", flush=True)
    read, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        index = choose.randrange(40)
        tokens = 20 + index
        found = store.read(key_of(index), LAYOUT, tokens)
        block = BLOCKS[index]
        if found is None:
            store.write(key_of(index), block)
        else:
            assert same(found, block), f"a wrong block {index}"
            read += 1
        assert bytes_on_disk(folder) <= limit + block.bytes + 4096, "more than is allowed"
        if choose.random() < 0.02:
            store.drop(key_of(choose.randrange(40)))
        if choose.random() < 0.01:
            _, damaged = store.verify()
            assert not damaged, f"damaged: {damaged}"
    print(read)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
