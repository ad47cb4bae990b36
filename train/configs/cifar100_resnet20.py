"""ResNet-20 on CIFAR-100 at 8, 4, 3, 2 and 1 bits at once, as vertical layering trains.

    uv run python train/vision.py --config train/configs/cifar100_resnet20.py --out cifar100

Not run by us: expect hours on one GPU. Vertical layering (arXiv 2212.05326) reports on CIFAR-100;
its tables are not at hand, and neither its recipe: minimum-norm weights of the losses are our
reading of its multi-objective optimisation.
Prepare the data once: python -c "import tensorflow_datasets as t;
t.builder('cifar100', file_format='array_record').download_and_prepare()"
"""

from recipe import VisionRecipe

recipe = VisionRecipe(
    model="resnet20",
    dataset="tfds:cifar100",
    pad=4,
    flip=True,
    distill=0.5,
    objective="mgda",
    learning_rate=0.1,
    warmup=400,
    weight_decay=5e-4,
    batch_size=128,
    epochs=200,
    save_every=2000,
    log_every=100,
    evaluate_every=2000,
)
