"""ResNet-20 on CIFAR-10 at 8, 4, 2 and 1 bits at once, at the widths of Any-Precision DNN.

    uv run python train/vision.py --config train/configs/cifar10_resnet20.py --out cifar10

Not run by us: expect hours on one GPU. The peer (arXiv 1911.07346; models of its released code,
SHI-Labs/Any-Precision-DNNs) has accuracies of 91.89, 93.90, 93.86, 93.75 and 94.11 % as one network
at 1, 2, 4, 8 and 32 bits, and 91.50, 93.26, 93.62, 93.42 and 93.58 % as separate ones. That is not
like for like: its ResNet-20 has five times the published channels and normalises before it
convolves, trains 32 bits too, and rounds activations, clipped to 0 to 1, to as many bits as
weights; ours to 8.
Prepare the data once: python -c "import tensorflow_datasets as t;
t.builder('cifar10', file_format='array_record').download_and_prepare()"
"""

from recipe import VisionRecipe

recipe = VisionRecipe(
    model="resnet20",
    dataset="tfds:cifar10",
    pad=4,
    flip=True,
    widths=(8, 4, 2, 1),
    distill=1.0,
    learning_rate=0.1,
    warmup=400,
    weight_decay=5e-4,
    batch_size=128,
    epochs=200,
    save_every=2000,
    log_every=100,
    evaluate_every=2000,
)
