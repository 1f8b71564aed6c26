"""Put a trained model into the package: python tools/ship_model.py MODEL NAME  ->  ldm/models/NAME, weights in 16 bits."""

import sys

from ldm import model_folder

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    loaded = model_folder.load(sys.argv[1])
    folder = model_folder.SHIPPED / sys.argv[2]
    model_folder.save(loaded.model, folder, loaded.card, half=True)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB")
