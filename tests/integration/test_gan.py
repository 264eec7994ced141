"""Every trick in a generative adversarial network, as the tutorials of Lightning train it: by hand, in turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fits import differences, make_trainer, weights_of
from helpers.modules import eval_loader, lightning, train_loader
from helpers.tricks import TRICKS
from torch import Tensor, nn

from lit_tricks import callbacks
from lit_tricks.callbacks.soft_targets.callback import LossTrick

NOISE = 8


class GAN(lightning().LightningModule):  # type: ignore[misc]
    """A generator and a discriminator of 1x8x8 images. Labels of the batch go unused."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = nn.Sequential(
            nn.Linear(NOISE, 64),
            nn.Unflatten(1, (4, 4, 4)),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 1, 2, 2),
        )
        self.discriminator = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 1))

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def adversarial_loss(self, images: Tensor, real: bool) -> Tensor:
        verdict = self.discriminator(images)
        return F.binary_cross_entropy_with_logits(verdict, torch.full_like(verdict, float(real)))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, _ = batch
        of_generator, of_discriminator = self.optimizers()
        fakes = self(torch.randn(len(images), NOISE))

        self.toggle_optimizer(of_generator)
        loss = self.adversarial_loss(fakes, real=True)
        self.log("generator_loss", loss)
        self.manual_backward(loss)
        of_generator.step()
        of_generator.zero_grad()
        self.untoggle_optimizer(of_generator)

        self.toggle_optimizer(of_discriminator)
        loss = (self.adversarial_loss(images, real=True) + self.adversarial_loss(fakes.detach(), real=False)) / 2
        self.log("discriminator_loss", loss)
        self.manual_backward(loss)
        of_discriminator.step()
        of_discriminator.zero_grad()
        self.untoggle_optimizer(of_discriminator)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(torch.zeros(2, NOISE))

    def configure_optimizers(self) -> Any:
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), lr=0.01, betas=(0.5, 0.999), weight_decay=0.01) for part in parts]


def fit(*tricks: Any) -> dict[str, Tensor]:
    module, trainer = GAN(), make_trainer(*tricks)
    torch.manual_seed(0)
    trainer.fit(module, train_loader(), eval_loader())
    return weights_of(module)


# Those that the contract's module has to be named something for.
MAKE = {
    "ZeroGamma": callbacks.ZeroGamma,
    "DropPath": callbacks.DropPath,
    "Freeze": lambda: callbacks.Freeze(["generator.0", "discriminator.0"]),
    "Unfreeze": lambda: callbacks.Unfreeze({"generator.0": 1, "discriminator.0": 1}),
}
REJECTED = {
    name: "no supported loss used the target" for name in TRICKS if issubclass(getattr(callbacks, name), LossTrick)
}
REJECTED |= {
    "BinaryCrossEntropy": "^BinaryCrossEntropy.* has no trained bias of two or more classes",
    "ZeroGamma": "^ZeroGamma found no residual branches",
    "DropPath": "^DropPath found no drop-path layers",
    "PreciseBN": "^PreciseBN .*forward",
    "ScheduleFree": "^ScheduleFree .*forward",
    "ProgressiveResizing": "shapes cannot be multiplied",  # the discriminator's, which is for one size
    "TemperatureScaling": "^TemperatureScaling found no logits for the labels",
    "WhitenedStem": "^WhitenedStem runs `forward` of GAN .* and it failed",
    "TestTimeAugment": "^TestTimeAugment makes views of images .*, and `forward` gets none",
}


@pytest.mark.filterwarnings("ignore:SWA averages the statistics:UserWarning")
@pytest.mark.filterwarnings("ignore:FixRes fine-tunes a trained network, and GAN looks as if:UserWarning")
@pytest.mark.filterwarnings("ignore:(PreciseBN|ScheduleFree) runs `forward` of GAN on the inputs as they are in the ba")
@pytest.mark.parametrize("name", TRICKS)
def test_acts_or_says_why_not(name: str) -> None:
    trick = MAKE.get(name, TRICKS[name].make)()
    if name in REJECTED:
        with pytest.raises(RuntimeError, match=REJECTED[name]):
            fit(trick)
        return
    plain, tricked = fit(), fit(trick)
    assert all(weight.isfinite().all() for weight in tricked.values())
    if TRICKS[name].same_numbers:
        torch.testing.assert_close(tricked, plain, rtol=1e-3, atol=1e-5)
    else:
        for part in ("generator", "discriminator"):
            mine, its = ({n: w for n, w in found.items() if n.startswith(part)} for found in (tricked, plain))
            assert differences(mine, its), part
