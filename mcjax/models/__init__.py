"""Language models.

decoder         what a model is made of, described by data
weights         its weights by role: paths, shapes, beginnings
language_model  the described model as a function and as a Linen module, its layers scanned
attention       grouped queries, and queries to a latent
delta           the gated delta rule
experts         gated networks, for all tokens or routed
norms           root mean square normalisation
rope            rotary positions and their stretchings
families        a page for each family: its config and its tensors
resnet, vit     images, with `layers` that train at every width
"""

from mcjax.models.language_model import LanguageModel

__all__ = ["LanguageModel"]
