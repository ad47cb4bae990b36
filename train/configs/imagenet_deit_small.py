"""DeiT-S on ImageNet at 8, 4, 3, 2 and 1 bits at once, with CutMix and LUMix.

    uv run python train/vision.py --config train/configs/imagenet_deit_small.py --out deit_small

Not run by us: days on eight accelerators. LUMix (arXiv 2211.15846) raises float DeiT-S by 0.7
points (from 79.8 %, arXiv 2012.12877, whose stochastic depth, RandAugment, erasing, label smoothing
and mixup beside CutMix are not here, so expect less); at these widths we know no accuracy.
Prepare the data once, after a manual download that TFDS describes: python -c
"import tensorflow_datasets as t;
t.builder('imagenet2012', file_format='array_record').download_and_prepare()"
and likewise imagenet_a; for ImageNet-O unpack its archive here, which makes a folder imagenet-o.
"""

from recipe import VisionRecipe

from mcjax.lumix import R_R, R_S

recipe = VisionRecipe(
    model="vit_small",
    dataset="tfds:imagenet2012",
    image_size=224,
    flip=True,
    distill=0.5,
    mixing="cutmix",
    r_s=R_S,
    r_r=R_R,
    optimiser="adamw",
    learning_rate=1e-3,
    warmup=6250,
    weight_decay=0.05,
    batch_size=1024,
    accumulation=4,
    epochs=300,
    dtype="bfloat16",
    save_every=1000,
    log_every=100,
    evaluate_every=5000,
    shifted=("tfds:imagenet_a",),
    outliers=("folder:imagenet-o",),
)
