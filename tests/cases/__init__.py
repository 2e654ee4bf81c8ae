"""What tests run on ranks. Gradients of small models' layers stay apart there, as those of large models do."""

from mtl.train import gradient

gradient.LEAST = 1
