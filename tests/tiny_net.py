"""The network of most tests, in a file of its own: the processes that tests start need not import conftest.py."""

from torch import nn

from models import FaceNet


class TinyNet(FaceNet):
    """FaceNet, crops and gate included, on a network of 10,000 weights with BatchNorm and dropout."""

    def __init__(
        self,
        pretrained=None,
        dropout=0.4,
        freeze_until=None,
        crops=None,
        mirror=False,
        constant=None,
        backbone="facenet",
    ):
        nn.Module.__init__(self)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=4),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(16, 512),
        )
        self.dim, self.crops, self.wide, self.mirror = 512, None, None, mirror
        if crops:
            self.widen(crops)
        self._frozen = [self.backbone[:5].requires_grad_(False)] if freeze_until else []
