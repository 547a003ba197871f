"""Training steps of the paper's network: `ReIDModel` with the total loss of equation 11.

`PairedIdentitySampler` draws batches of P people with K images in each modality, so that both batches have
the same identity at the same place. The images here are random; `mrcn-fast train` reads data sets.
"""

import torch

from mrcn_fast.reid.data import Augmentation, PairedIdentitySampler
from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.training.losses import ReIDLoss

PEOPLE, IMAGES_EACH = 6, 5


def main() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, PEOPLE * IMAGES_EACH, 3, 64, 32), dtype=torch.uint8)
    identities = torch.arange(PEOPLE).repeat_interleave(IMAGES_EACH)
    known = identities.tolist()
    sampler = PairedIdentitySampler(known, known, identities=3, images=2, batches=3)
    augment = Augmentation((64, 32), padding=4)

    model = ReIDModel(PEOPLE, model="mrcn", depth=18, stages=(0,))
    criterion = ReIDLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    model.train()
    for step, batch in enumerate(sampler):
        visible_places, infrared_places = torch.tensor(batch).unbind(dim=1)
        labels = identities[visible_places]
        output = model(augment(images[0, visible_places]), augment(images[1, infrared_places]))
        losses = criterion(output, labels)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        print(f"step {step}: " + ", ".join(f"{k} {v.item():.3f}" for k, v in losses._asdict().items()))


if __name__ == "__main__":
    main()
