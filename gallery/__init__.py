"""Published models with their trained weights, each checked convolution by convolution: ``make gallery``."""
