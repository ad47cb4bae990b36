"""ResNet-50 on ImageNet at 8, 4, 3, 2 and 1 bits at once.

    uv run python train/vision.py --config train/configs/imagenet_resnet50.py --out resnet50

Not run by us: days on eight accelerators, and we know no accuracy to expect; a float ResNet-50
reaches about 76 % with this schedule. Activations take five times the memory of one network: raise
`accumulation` if they do not fit.
Prepare the data once, after a manual download that TFDS describes: python -c
"import tensorflow_datasets as t;
t.builder('imagenet2012', file_format='array_record').download_and_prepare()"
"""

from recipe import VisionRecipe

recipe = VisionRecipe(
    model="resnet50",
    dataset="tfds:imagenet2012",
    image_size=224,
    flip=True,
    distill=0.5,
    learning_rate=0.4,
    warmup=6250,
    weight_decay=1e-4,
    batch_size=1024,
    accumulation=4,
    epochs=90,
    dtype="bfloat16",
    save_every=1000,
    log_every=100,
    evaluate_every=5000,
    shifted=("tfds:imagenet_a",),
)
