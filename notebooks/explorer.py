"""The widgets of the notebooks: ``from explorer import DrawingPad, LatentExplorer``."""

import html
import io
import random
from collections.abc import Callable
from pathlib import Path

import anywidget
import ipywidgets as widgets
import matplotlib.pyplot as plt
import torch
import traitlets
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Normal
from torchvision.transforms.v2.functional import resize
from torchvision.utils import save_image

import vae_helpers as vh


def png(image: Tensor) -> bytes:
    """``image`` [C, H, W], float in [0, 1], as a PNG file."""
    save_image(image, file := io.BytesIO(), format="png")
    return file.getvalue()


class Map:
    """Codes of at most ``most`` images of ``data.test`` (``part``): their ``means`` [N, latent_dim], the mean KL of each
    latent (``kl``, nats), and a map of their plane of largest variance with the names of the classes."""

    def __init__(self, model: torch.nn.Module, data: vh.ImageData, most: int):
        self.part = data.test[torch.linspace(0, len(data.test) - 1, min(len(data.test), most)).long()]
        self.means, stddevs = vh.encode_all(model, self.part)
        self.kl = vh.gaussian_kl(self.means[..., None], 2 * stddevs[..., None].log()).mean(0)
        means, labels, classes = self.means.double(), self.part.labels, data.classes
        flat = torch.eye(2)[:means.shape[1]].to(means)  # one or two latents are shown as they are
        plane = flat if means.shape[1] < 3 else torch.linalg.eigh(means.T.cov(correction=0)).eigenvectors[:, -2:]
        self.plane = 0.95 * plane / (means @ plane).abs().amax(0).clamp(min=2.5)  # on the map from -1 to 1
        points = means @ self.plane
        names = sorted((float(points[labels == label, 1].median()), label) for label in labels.unique().tolist())
        slots = torch.linspace(-1, 1, len(names)) * min(0.9, 0.1 * len(names))
        with plt.style.context(vh.STYLE, after_reset=True):  # not in the reader's style
            axes = Figure((3.5, 3.5), layout="none").add_axes((0, 0, 1, 1), xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[])
            for (middle, label), slot in zip(names, slots, strict=True):  # names move half way to slots: none hides another
                mine, colour = points[labels == label], vh.COLOURS[label % len(vh.COLOURS)]
                axes.scatter(*mine.T, s=8, color=colour, alpha=0.6, linewidths=0)
                axes.text(mine[:, 0].median(), (middle + slot) / 2, classes[label], ha="center", va="center",
                          fontsize=9, parse_math=False, bbox={"fc": "white", "ec": colour, "boxstyle": "round,pad=0.15"})
            axes.figure.savefig(file := io.BytesIO(), format="png")
        self.picture = torch.tensor(plt.imread(io.BytesIO(file.getvalue())))[..., :3].permute(2, 0, 1)

    def at(self, z: Tensor) -> bytes:
        """The map as a PNG file, with a ring at ``z`` [latent_dim]."""
        (x, y), places = (z.double() @ self.plane).clamp(-0.95, 0.95), torch.linspace(-1, 1, self.picture.shape[-1])
        off_the_ring = (torch.hypot(places - x, places[:, None] + y) - 0.06).abs()
        return png(self.picture * (140 * off_the_ring - 1).clamp(0, 1))  # black on it


class Panel(widgets.VBox):
    """Buttons for ``actions`` and a line of text, ``status``, in which what fails at a widget is written."""

    def __init__(self, kind: str, actions: dict[str, Callable[[], None]]):
        super().__init__(_dom_classes=["panel", kind])
        self.status, self.sharp = widgets.HTML(), widgets.HTML("<style>.panel img {image-rendering: pixelated}</style>")
        self.buttons = {name: widgets.Button(description=name, layout={"width": "auto"}) for name in actions}
        for name, button in self.buttons.items():
            button.on_click(lambda button, action=actions[name]: self.act(action))

    def act(self, action: Callable[[], None]) -> None:
        """Answers a widget at once: meanwhile the page holds back all but its newest value, so no stale frames queue up."""
        try:
            self.status.value = ""
            action()
        except Exception as error:  # a traceback would go to a log that nobody has open
            self.status.value = html.escape(f"{type(error).__name__}: {error}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}: moves where a kernel runs"


class LatentExplorer(Panel):
    """Panel that moves z by hand and shows the mean image of p(x|z), for any model whose q(z|x) is over vectors.

    Sliders for the ``num_sliders`` latents of largest KL, on at most 1,000 images of ``data.test``; a map of the plane of
    largest variance of their codes, z in the ring. ``seed``: of the draws. ``folder``: where "save" writes, by default
    explorer/ in output_dir("images"). A program reads and sets ``z`` [latent_dim], exact where a slider rounds or clips, and
    ``label``, an index or a name. Raises ValueError for what does not fit; what fails at a widget is written below them."""

    def __init__(self, model: torch.nn.Module, data: vh.ImageData, *, num_sliders: int = 8, seed: int = 0,
                 folder: str | Path | None = None):
        if num_sliders not in range(1, 1000):
            raise ValueError(f"num_sliders is {num_sliders!r}; it must be a whole number from 1 to 999")
        super().__init__("explorer", {
            "encode": lambda: self.encode(self.index.value),
            "random image": lambda: self.encode(self._random.randrange(len(data.test))), "prior sample": self._sample,
            "reset": lambda: self._move(torch.zeros_like(self._z)), "save": self._save,
            "keep A": lambda: self.kept.update(A=self._z), "keep B": lambda: self.kept.update(B=self._z)})
        self.model, self.data, self.folder, self._random = model, data, folder, random.Random(seed)
        self._map = Map(model, data, 1000)
        self._z, kl, self._moving = self._map.means[0], self._map.kl, False
        self.kept = {"A": self._z, "B": torch.zeros_like(self._z)}
        wide = {"layout": {"width": "320px"}, "style": {"description_width": "110px"}}
        self.sliders = {dim: widgets.FloatSlider(description=f"z[{dim}], {kl[dim]:.2f} nats", min=-4, max=4, step=1 / 16,
                                                 **wide) for dim in kl.argsort(descending=True)[:int(num_sliders)].tolist()}
        self.labels = widgets.Dropdown(description="label", options=data.classes[:getattr(model, "num_classes", 0)], **wide)
        self.index = widgets.BoundedIntText(description="test image", max=len(data.test) - 1, layout={"width": "180px"})
        self.play, self.walk = widgets.Play(interval=50), widgets.IntSlider(description="A to B", readout=False)
        widgets.link((self.play, "value"), (self.walk, "value"))  # both from 0 to 100
        self.observe(lambda change: self.play.set_trait("playing", False), "comm")  # when the panel is closed
        for widget, action in [(self.labels, lambda: self._move(self._z)), (self.walk, self._step), *(
                (slider, lambda dim=dim: self._move(self._z.index_fill(0, torch.tensor(dim), self.sliders[dim].value)))
                for dim, slider in self.sliders.items())]:
            widget.observe(lambda change, action=action: self._moving or self.act(action), "value")
        self.image, self.pair, self.map = (widgets.Image(width=width) for width in (280, 140, 280))
        columns = [[*[self.labels][:len(self.labels.options)], *self.sliders.values()],
                   [self.image, widgets.Label("mean of p(x|z)")], [self.pair, widgets.Label("test, reconstruction")],
                   [self.map, widgets.Label("map of the test images")]]
        self.children = [widgets.HBox(row, layout={"flex_flow": "row wrap", "grid_gap": "4px"}) for row in (
            [*map(widgets.VBox, columns)], [self.index, *self.buttons.values(), self.play, self.walk],
            [self.status, self.sharp])]
        self.encode(0)

    def encode(self, index: int) -> None:
        """Goes to the mean of q(z|x) of the test image ``index``, shown beside its reconstruction, and to its label."""
        if index not in range(len(self.data.test)):
            raise ValueError(f"index is {index!r}; it must be a whole number from 0 to {len(self.data.test) - 1}")
        part = self.data.test[int(index)]
        self._move(vh.encode_all(self.model, part)[0][0], int(part.labels[0]) if self.labels.options else None)
        self.index.value, self.pair.value = int(index), png(torch.cat([part.batch()[0][0], self._shown], 1))

    def _sample(self) -> None:
        with vh.seeded(self._random.randrange(2**31)), torch.no_grad():
            own = getattr(self.model, "prior", None)
            self._move(own.sample((1,)).flatten() if own is not None else torch.randn_like(self._z))

    def _save(self) -> None:
        folder = Path(self.folder or vh.output_dir("images") / "explorer").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        path = next(folder / f"{i:03}.png" for i in range(1, 10**6) if not any(folder.glob(f"{i:03}.*")))
        path.write_bytes(self.image.value)
        torch.save({"z": self._z, "label": self.label}, path.with_suffix(".pt"))
        self.status.value = html.escape(f"saved {path} and its z, {path.stem}.pt")

    def _step(self) -> None:  # an arc around 0 keeps the length of draws of N(0, I) (White 2016, arXiv 1609.04468)
        a, b, t = self.kept["A"], self.kept["B"], self.walk.value / 100
        angle = torch.cosine_similarity(a, b, dim=0).clamp(-1, 1).acos()
        arc = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
        self._move(arc if angle.sin() > 1e-3 else torch.lerp(a, b, t))

    def _move(self, z: Tensor, label: int | str | None = None) -> None:
        """Goes to ``z`` and ``label``: decodes once, and takes every picture and slider there."""
        z, names = torch.as_tensor(z).detach().to(self._z, copy=True), self.labels.options
        if z.shape != self._z.shape or not z.isfinite().all():
            raise ValueError(f"z has shape {list(z.shape)}; it must be [{len(self._z)}] and finite")
        if label not in (None, *names, *range(len(names))):
            raise ValueError(f"label is {label!r}; it must be an index or a name of {names}")
        label = self.label if label is None else names.index(label) if label in names else int(label)
        self._shown = vh.mean_images(self.model, z[None], label)[0]
        self._z, self._moving = z, True
        try:
            self.image.value, self.labels.index = png(self._shown), label
            self.map.value = self._map.at(z)
            for dim, slider in self.sliders.items():  # on a binary grid: other values the page rounds and sends back
                slider.value = round(16 * float(z[dim].clamp(-4, 4))) / 16
        finally:
            self._moving = False

    z = property(lambda self: self._z.clone(), _move)
    label = property(lambda self: self.labels.index, lambda self, label: self._move(self._z, label))

    def _repr_png_(self) -> bytes:
        """Traversals of the sliders' latents: they stand in the panel's place where no kernel runs."""
        points, values = self._z.repeat(len(self.sliders), 7, 1), range(-3, 4)
        points[range(len(points)), :, list(self.sliders)] = torch.tensor(values).to(points)
        images = vh.mean_images(self.model, points.flatten(0, 1), self.label)
        with plt.style.context(vh.STYLE, after_reset=True):
            figure = vh.show_images(images, columns=7, column_labels=[*map(str, values)], row_labels=[
                f"$z_{{{dim}}}$, {self._map.kl[dim]:.2f} nats" for dim in self.sliders],
                title="value of the latent" + f", label {self.labels.value}" * bool(self.labels.options))
            figure.savefig(file := io.BytesIO(), format="png")
        return file.getvalue()


class Canvas(anywidget.AnyWidget):
    """A square to draw on. ``ink``: its 112 x 112 grey levels as bytes; a change of ``cleared`` empties it."""

    ink = traitlets.Any(b"").tag(sync=True)
    cleared = traitlets.Int(0).tag(sync=True)
    _esm = """
    const side = 112, zoom = 2;
    function render({model, el}) {
        const canvas = document.createElement("canvas"), small = document.createElement("canvas");
        canvas.width = canvas.height = zoom * side;
        small.width = small.height = side;
        canvas.className = "pad";
        canvas.style.touchAction = "none";  // a finger draws, and does not scroll
        canvas.style.cursor = "crosshair";
        const pen = canvas.getContext("2d"), reader = small.getContext("2d", {willReadFrequently: true});
        const clear = () => pen.fillRect(0, 0, canvas.width, canvas.height);
        clear();
        Object.assign(pen, {strokeStyle: "white", lineWidth: 9 * zoom, lineCap: "round", lineJoin: "round"});
        let last = null, due = false;
        function send() {  // at most once for each frame of the page
            if (due) return;
            due = true;
            requestAnimationFrame(() => {
                due = false;
                reader.drawImage(canvas, 0, 0, side, side);
                const rgba = reader.getImageData(0, 0, side, side).data;
                model.set("ink", new DataView(Uint8Array.from({length: side * side}, (_, i) => rgba[4 * i]).buffer));
                model.save_changes();
            });
        }
        function draw(event) {
            const box = canvas.getBoundingClientRect();
            const at = [event.clientX - box.left, event.clientY - box.top].map(v => v * canvas.width / box.width);
            pen.beginPath();
            pen.moveTo(...(last ?? at));
            pen.lineTo(...at);
            pen.stroke();
            last = at;
            send();
        }
        canvas.addEventListener("pointerdown", event => { canvas.setPointerCapture(event.pointerId); draw(event); });
        canvas.addEventListener("pointermove", event => { if (last) draw(event); });
        for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
        model.on("change:cleared", clear);
        el.append(canvas);
    }
    export default {render};
    """


def like_mnist(ink: Tensor) -> Tensor:
    """A drawing [H, W], light on dark in [0, 1], made into an image [1, 28, 28] as those of MNIST were: its ink scaled into
    20 x 20 pixels, the centre of mass in the middle (LeCun et al. 1998). Zeros without ink."""
    image, (rows, columns) = torch.zeros(1, 28, 28), ((ink > 0.5).any(dim).nonzero()[:, 0] for dim in (1, 0))
    if not len(rows):
        return image
    box = ink[None, rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    size = [max(1, round(20 * side / max(box.shape))) for side in box.shape[1:]]
    small = resize(box, size, antialias=True).clamp(0, 1)
    share = small[0] / small.sum()
    top, left = (int((14 - (share.sum(dim) * torch.arange(n)).sum()).round().clamp(0, 28 - n))
                 for dim, n in zip((1, 0), size, strict=True))
    image[:, top:top + size[0], left:left + size[1]] = small
    return image


class DrawingPad(Panel):
    """A square to draw a digit on. While you draw: the image made of it, its reconstruction, q(z|x) of the eight latents of
    largest KL, its place on the map, and the five test images with the nearest codes.

    ``explorer``: a LatentExplorer of the same model, to which the button sends the code. A program draws by ``draw`` and
    reads ``x`` [1, 28, 28] and ``z`` [latent_dim]. Raises ValueError for other images than grey ones of 28 x 28, and for a
    model that takes labels."""

    def __init__(self, model: torch.nn.Module, data: vh.ImageData, *, explorer: LatentExplorer | None = None):
        if data.image_shape != (1, 28, 28):
            raise ValueError(f"data has images of shape {data.image_shape}; drawings are grey, (1, 28, 28)")
        if getattr(model, "num_classes", 0):
            raise ValueError(f"model takes labels of {model.num_classes} classes; a drawing has none")
        super().__init__("drawing", {"clear": self.clear, "send to the explorer": self._to_explorer})
        self.model, self.explorer, self.canvas, self._map = model, explorer, Canvas(), Map(model, data, 2000)
        self._dims = self._map.kl.argsort(descending=True)[:8]
        self.image, self.recon, self.posterior, self.map, self.near = (
            widgets.Image(width=width, height=height)
            for width, height in ((112, 112), (224, 224), (224, 112), (280, 280), (560, 112)))
        self.buttons["send to the explorer"].disabled = explorer is None
        self.canvas.observe(lambda change: self.act(lambda: self.draw(
            torch.frombuffer(bytearray(change.new), dtype=torch.uint8).view(112, 112) / 255)), "ink")
        boxes = [[self.canvas, "draw here"], [self.image, "x", self.posterior, f"q(z|x) of z{self._dims.tolist()}"],
                 [self.recon, "mean of p(x|z)"], [self.map, "map of the test images"]]
        boxes = [widgets.VBox([widgets.Label(part) if isinstance(part, str) else part for part in box]) for box in boxes]
        self.children = [widgets.HBox(boxes, layout={"flex_flow": "row wrap", "grid_gap": "4px"}),
                         widgets.HBox([*self.buttons.values(), self.status, self.sharp]), self.near,
                         widgets.Label("test images with the nearest codes")]
        self.clear()

    def clear(self) -> None:
        """Empties the square."""
        self.canvas.cleared += 1
        self.draw(torch.zeros(112, 112))

    def draw(self, ink: Tensor) -> None:
        """Shows what the model makes of a drawing [H, W], light on dark in [0, 1]."""
        self.x = like_mnist(ink)
        split = vh.Split((self.x[None] > 0.5).mul(255).byte(), torch.zeros(1, dtype=torch.int64))  # the encoder knows bits
        (self.z,), (stddev,) = vh.encode_all(self.model, split)
        grid = torch.linspace(-4, 4, 160)
        density = Normal(self.z[self._dims, None], stddev[self._dims, None]).log_prob(grid).exp()
        near = (self._map.means - self.z).norm(dim=1).argsort()[:5]
        self.image.value, self.recon.value = png(self.x), png(vh.mean_images(self.model, self.z[None])[0])
        self.posterior.value = png((density / density.amax(1, keepdim=True)).repeat_interleave(10, 0)[None])
        self.map.value, self.near.value = self._map.at(self.z), png(torch.cat([*self._map.part[near].batch()[0]], dim=2))

    def _to_explorer(self) -> None:
        self.explorer.z = self.z
        self.status.value = "sent: see the panel"
