"""The image pipeline: the mode of the images fits the channels of the network."""

import numpy as np
import pytest
from PIL import Image

from timm_npu_irv2.data.pipeline import MODES, ImagePipeline
from timm_npu_irv2.errors import UserError

CONFIG = {'input_size': (3, 32, 32), 'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.4), 'interpolation': 'bilinear',
          'crop_pct': 0.9}


@pytest.mark.parametrize(('channels', 'mode'), [(1, 'L'), (2, 'LA'), (3, 'RGB'), (4, 'RGBA')])
def test_the_usual_mode_follows_the_channels(channels, mode):
    pipeline = ImagePipeline.from_config({**CONFIG, 'input_size': (channels, 32, 32)})
    assert pipeline.input_img_mode == mode
    assert len(pipeline.mean) == len(pipeline.std) == channels


@pytest.mark.parametrize('mode', MODES)
def test_every_mode_yields_as_many_channels_as_it_says(mode):
    channels = len(Image.new(mode, (1, 1)).getbands())
    pipeline = ImagePipeline.from_config({**CONFIG, 'input_size': (channels, 32, 32)}, mode)
    image = Image.fromarray(np.zeros((40, 50, 3), np.uint8)).convert(mode)
    assert pipeline.transform()(image).shape == pipeline.transform(normalize=True)(image).shape == (channels, 32, 32)


@pytest.mark.parametrize(('channels', 'mode', 'message'), [
    (3, 'L', "mode 'L' have 1 channels, the network takes 3"),
    (4, 'RGB', "mode 'RGB' have 3 channels, the network takes 4"),
    (5, None, 'not 5'),
    (3, 'BGR', "'BGR': expected one of L, LA, RGB"),
])
def test_a_mode_that_does_not_fit_is_refused(channels, mode, message):
    with pytest.raises(UserError, match=message):
        ImagePipeline.from_config({**CONFIG, 'input_size': (channels, 32, 32)}, mode)
