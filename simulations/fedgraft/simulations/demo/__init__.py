"""The built-in demonstration: a backbone pre-trained on drawn digits, adapted to real ones.

Everything it needs ships with the package or comes with scikit-learn, so that a first federation
runs without a download: `glyphs` draws the source domain, `pretrain` is the recipe behind the
shipped backbone `builtin:glyph-vit`, and `digits` loads the target domain.
"""
