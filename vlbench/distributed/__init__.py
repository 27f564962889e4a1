"""Several processes that train one model: launcher, process group, collectives."""
