"""How a party becomes one: the authority's folder, guests with an invite, the parts of the model that a silo gets."""
