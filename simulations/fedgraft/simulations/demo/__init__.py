"""The built-in demonstration: a backbone pre-trained on drawn digits, adapted to real digits.

All its files come with the package or with scikit-learn, so that a first federation runs without a
download. `glyphs` draws the source domain, `pretrain` trained the included backbone
`builtin:glyph-vit`, and `digits` loads the target domain.
"""
