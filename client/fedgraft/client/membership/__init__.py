"""How a site belongs to a federation: keys, kit, roster, and the backbone it fetches."""
