"""Trains a classifier of timm that pools with SimPool, and draws where it looks.

    python examples/attach_simpool.py OUT                 the embedded images: a minute and a half on a CPU core
    python examples/attach_simpool.py OUT --data DATA     your own: DATA/train/CLASS/IMAGE and DATA/val/CLASS/IMAGE

Everything but two lines is an ordinary supervised training, which can be any other: `attach_simpool` puts SimPool in place
of the global pooling, and `simpool_maps` returns its attention. OUT gets classifier.pth and maps.png: images of val, with
the map of the untrained and of the trained classifier over them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from dino_simpool import attach_simpool, simpool_maps
from dino_simpool.pictures import overlay, png_bytes, strip
from dino_simpool.synthetic import write_dataset


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels, a multiple of 8")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    data: Path = options.data or options.out / "data"
    if options.data is None:
        write_dataset(str(data), seed=0, train_per_class=200, val_per_class=50, size=options.size)
    torch.manual_seed(0)
    size = options.size
    crop = [transforms.RandomResizedCrop(size, (0.5, 1.0)), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    center = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    train = datasets.ImageFolder(str(data / "train"), transforms.Compose(crop))
    val = datasets.ImageFolder(str(data / "val"), transforms.Compose(center))

    # A narrow ResNet, with a map of an eighth of the image. With pretrained=True, or another name, it is fine-tuning.
    widths = {"channels": (32, 48, 64, 96), "output_stride": 8}
    model = timm.create_model("resnet10t", num_classes=len(train.classes), **widths)
    attach_simpool(model, gamma=2.0)

    shown = torch.stack([val[number][0] for number in range(0, len(val), max(1, len(val) // 8))][:8])
    untrained = simpool_maps(model, 2 * shown - 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=len(train) > 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.epochs * len(loader))
    for epoch in range(options.epochs):
        model.train()
        total = 0.0
        for images, labels in loader:
            loss = F.cross_entropy(model(2 * images - 1), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / len(loader)
        model.eval()
        with torch.no_grad():
            right = sum((model(2 * images - 1).argmax(1) == labels).sum().item() for images, labels in DataLoader(val, 64))
        print(f"epoch {epoch + 1}: loss {total:.3f}, val {100 * right / len(val):.1f} %", flush=True)

    torch.save(model.state_dict(), options.out / "classifier.pth")
    trained = simpool_maps(model, 2 * shown - 1)
    large = F.interpolate(shown, scale_factor=max(1, 128 // size))
    rows = [list(large)] + [[overlay(*pair) for pair in zip(large, maps, strict=True)] for maps in (untrained, trained)]
    (options.out / "maps.png").write_bytes(png_bytes(torch.cat([strip(row) for row in rows], dim=1)))
    print(f"written to {options.out / 'classifier.pth'} and {options.out / 'maps.png'}")


if __name__ == "__main__":
    main()
