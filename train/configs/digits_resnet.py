"""A residual network of 8 layers on handwritten digits, at 8, 4, 3, 2 and 1 bits at once.

    uv run python train/vision.py --config train/configs/digits_resnet.py --out digits

Four minutes on 2 busy CPU cores, no download (the digits come with scikit-learn); ends at an
accuracy of 97.8, 97.5, 97.5, 97.8 and 97.2 % on 360 images at 8, 4, 3, 2 and 1 bits, differences
within chance.
"""

from recipe import VisionRecipe

recipe = VisionRecipe(
    model="resnet8",
    dataset="digits",
    pad=1,
    batch_size=64,
    epochs=20,
    learning_rate=0.1,
    warmup=20,
    save_every=200,
    log_every=20,
    evaluate_every=100,
)
