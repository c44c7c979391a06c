"""A site's membership in a federation: keys, kit, roster, and the backbone that it fetches."""
