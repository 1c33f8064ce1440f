"""Train on the cluster: `ray job submit --working-dir . -- python jobs/train.py --preset seed-mlp …`."""

import sys

from vaegan_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
