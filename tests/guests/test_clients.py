"""Libraries that train, adapt, compress, load and convert networks work with this one as with timm's."""

import copy
import io

import pytest
import torch
from PIL import Image
from torch import nn

from timm_npu_irv2 import hub, weights
from timm_npu_irv2.deploy import to_inference
from timm_npu_irv2.layers import Siblings

from ..conftest import create_pair, relative_error
from .pair import images, short_pair

pytestmark = pytest.mark.filterwarnings('ignore')


def close(reference, ours, limit=1e-5, x=None):
    x = images() if x is None else x
    with torch.no_grad():
        return relative_error(ours(x), reference(x)) < limit


def test_peft_adapts_the_last_convolution_of_each_block():
    peft = pytest.importorskip('peft')
    adapted = []
    for model in short_pair():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=['conv2d'], init_lora_weights=False)
        adapted.append(peft.get_peft_model(model, config).eval())
    counts = [model.get_nb_trainable_parameters() for model in adapted]
    assert counts[0][0] == counts[1][0] > 0
    adapted[1].base_model.model.load_state_dict(adapted[0].base_model.model.state_dict(), strict=False)
    adapters = {name: p for name, p in adapted[0].named_parameters() if 'lora_' in name}
    for name, parameter in adapted[1].named_parameters():
        if 'lora_' in name:
            parameter.data.copy_(adapters[name])
    assert close(*adapted)
    merged = [model.merge_and_unload() for model in adapted]
    assert close(*merged)


def test_ptflops_counts_timms_operations():
    ptflops = pytest.importorskip('ptflops')
    counts = [ptflops.get_model_complexity_info(model, (3, 75, 75), as_strings=False, print_per_layer_stat=False)[0]
              for model in short_pair()]
    assert abs(counts[1] / counts[0] - 1) < 0.01


def test_torch_pruning_removes_channels():
    pruning = pytest.importorskip('torch_pruning')
    sizes = []
    for model in short_pair():
        # What merged convolutions compute is split at fixed channels, which Torch-Pruning cannot change, so they keep
        # theirs. It then leaves the residual streams as they are, too, since one of them feeds the streams.
        merged = [module.conv for module in model.modules() if isinstance(module, Siblings)]
        before = sum(p.numel() for p in model.parameters())
        pruner = pruning.pruner.MagnitudePruner(
            model, images(1), importance=pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.25,
            ignored_layers=[model.classif, *merged])
        pruner.step()
        sizes.append(sum(p.numel() for p in model.parameters()) / before)
        assert model(images()).shape == (2, 5)
    assert sizes[0] < 0.7 and sizes[1] < 0.9


def test_accelerate_offloads_layer_by_layer():
    accelerate = pytest.importorskip('accelerate')
    reference, ours = short_pair()
    accelerate.cpu_offload(ours, execution_device='cpu')
    assert all(parameter.is_meta for parameter in ours.parameters())
    assert close(reference, ours)


def test_accelerate_loads_and_dispatches(tmp_path):
    accelerate = pytest.importorskip('accelerate')
    import safetensors.torch  # noqa: PLC0415

    reference, ours = create_pair(num_classes=5)
    safetensors.torch.save_file({name: value.contiguous() for name, value in ours.state_dict().items()},
                                tmp_path / 'model.safetensors')
    with accelerate.init_empty_weights():
        _, empty = create_pair(num_classes=5)
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / 'model.safetensors'), device_map={'': 'cpu'})
    assert close(reference.eval(), loaded.eval())


def test_transformers_loads_what_it_saves(tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmWrapperConfig(architecture='inception_resnet_v2_npu', num_labels=5,
                                            model_args={}, pretrained_cfg={'num_classes': 5, 'input_size': [3, 75, 75]})
    model = transformers.TimmWrapperForImageClassification(config).eval()
    reference, ours = create_pair(num_classes=5)
    model.timm_model.load_state_dict(ours.state_dict())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert relative_error(loaded(images()).logits, reference.eval()(images())) < 1e-5


@pytest.mark.parametrize('target', ['npu', 'timm'])
def test_transformers_loads_both_kinds_of_exports(tmp_path, target):
    transformers = pytest.importorskip('transformers')
    reference, ours = create_pair(num_classes=5)
    torch.save({'state_dict': ours.state_dict(), 'epoch': 0, 'args': {'img_size': 75}}, tmp_path / 'a.pth')
    (tmp_path / 'names').write_text('ant\nbee\ncat\ndog\neel\n')
    folder = hub.export(tmp_path / 'a.pth', tmp_path / 'export', target=target, class_names=tmp_path / 'names')
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path / 'again')
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'again').eval()
    with torch.no_grad():
        for each in (model, again):
            assert relative_error(each(images()).logits, reference.eval()(images())) < 1e-5
    transformers.AutoImageProcessor.from_pretrained(folder)
    answers = transformers.pipeline('image-classification', model=str(folder))(Image.new('RGB', (90, 80), 'red'))
    assert {each['label'] for each in answers} == {'ant', 'bee', 'cat', 'dog', 'eel'}


def test_lightning_trains_it():
    lightning = pytest.importorskip('lightning')

    class Task(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch, _index):
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    data = torch.utils.data.TensorDataset(images(8, torch.float64, 107), torch.arange(8) % 5)
    losses = []
    for model in short_pair(torch.float64):
        task = Task(model.train())
        trainer = lightning.Trainer(accelerator='cpu', max_steps=3, logger=False, enable_checkpointing=False,
                                    enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=4))
        losses.append(task.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_segmentation_models_use_its_features():
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = smp.Unet('tu-inception_resnet_v2_npu', encoder_weights=None, classes=2).eval()
    reference = smp.Unet('tu-inception_resnet_v2', encoder_weights=None, classes=2).eval()
    reference.decoder.load_state_dict(model.decoder.state_dict())
    reference.segmentation_head.load_state_dict(model.segmentation_head.state_dict())
    model.encoder.model.load_state_dict(weights.convert(reference.encoder.model.state_dict(), to='npu'))
    shapes = [encoder.out_channels for encoder in (model.encoder, reference.encoder)]
    assert shapes[0] == shapes[1]
    x = images(1, size=128)
    with torch.no_grad():
        for actual, expected in zip(model.encoder(x), reference.encoder(x), strict=True):
            assert relative_error(actual, expected) < 1e-5
        assert relative_error(model(x), reference(x)) < 1e-5


def test_fastai_finds_its_body():
    vision = pytest.importorskip('fastai.vision.learner')
    bodies = []
    for name in ('inception_resnet_v2', 'inception_resnet_v2_npu'):
        model, _ = vision.create_timm_model(name, 5, pretrained=False)
        bodies.append(model.eval())
    bodies[1][0].model.load_state_dict(bodies[0][0].model.state_dict())
    bodies[1][1].load_state_dict(bodies[0][1].state_dict())
    assert close(*bodies)


@pytest.mark.long
def test_fastai_trains_it():
    basics = pytest.importorskip('fastai.basics')
    pytest.importorskip('fastai.callback.progress')  # it adds no_bar
    data = torch.utils.data.TensorDataset(images(8, size=107), torch.arange(8) % 5)
    losses = []
    for model in short_pair(blocks=1):
        loaders = basics.DataLoaders(*(basics.DataLoader(data, bs=4) for _ in range(2)))
        learner = basics.Learner(loaders, model, loss_func=nn.CrossEntropyLoss(), lr=1e-4)
        with learner.no_bar(), learner.no_logging():
            learner.fit(2)
        losses.append(torch.tensor(learner.recorder.values).flatten())
    assert losses[0].isfinite().all() and relative_error(losses[1], losses[0]) < 1e-4


def test_torchao_quantizes_the_classifier():
    quantization = pytest.importorskip('torchao.quantization')
    reference, ours = short_pair()
    for model in (reference, ours):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert close(reference, ours, 1e-4)


@pytest.mark.parametrize('folded', [False, True])
def test_openvino_converts_the_module(folded):
    openvino = pytest.importorskip('openvino')
    reference, ours = create_pair(num_classes=5)
    network = to_inference(ours.eval()) if folded else ours.eval()
    compiled = openvino.compile_model(openvino.convert_model(network, example_input=images()), 'CPU',
                                      {'INFERENCE_PRECISION_HINT': 'f32'})
    actual = torch.from_numpy(compiled(images().numpy())[0])
    with torch.no_grad():
        assert relative_error(actual, reference.eval()(images())) < 1e-4


@pytest.mark.parametrize('dynamo', [False, True])
def test_onnx_exporters_give_timms_answers(dynamo, tmp_path):
    runtime = pytest.importorskip('onnxruntime')
    if dynamo:
        pytest.importorskip('onnxscript')
    reference, ours = short_pair()
    buffer = tmp_path / 'model.onnx'
    torch.onnx.export(ours, (images(),), str(buffer), dynamo=dynamo, input_names=['x'])
    session = runtime.InferenceSession(str(buffer), providers=['CPUExecutionProvider'])
    actual = torch.from_numpy(session.run(None, {'x': images().numpy()})[0])
    with torch.no_grad():
        assert relative_error(actual, reference(images())) < 1e-4


def test_copies_and_pickles_keep_the_answers():
    reference, ours = short_pair()
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert close(reference, copy.deepcopy(ours)) and close(reference, torch.load(buffer, weights_only=False))
