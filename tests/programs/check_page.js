// Runs in the head of a page of generator.py --page. Uses the page as a user does, and posts what it sees to ADDRESS.
const errors = [];
console.error = console.warn = (...words) => errors.push(words.join(" "));
for (const kind of ["error", "unhandledrejection", "securitypolicyviolation"]) {
  addEventListener(kind, (event) => errors.push(`${event.message || event.reason || event.violatedDirective}`), true);
}

let drawings = 0;
const putImageData = CanvasRenderingContext2D.prototype.putImageData;
CanvasRenderingContext2D.prototype.putImageData = function (...values) {
  drawings++;
  return putImageData.apply(this, values);
};

addEventListener("load", async () => {
  const until = async (happened) => {
    while (!happened()) await new Promise((resolve) => setTimeout(resolve, 5));
  };
  const drawn = () => until(() => drawings && !current && !wanted.size);
  const pixels = (canvas) => Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
  const buttons = () => Array.from($("faces").children);
  const names = () => buttons().map((button) => button.getAttribute("aria-label"));
  const faces = () => buttons().slice(0, 16).map((button) => pixels(button.firstChild));
  const click = async (element) => {
    const shown = $("faces").firstChild;
    element.click();
    if (element.id) await until(() => $("faces").firstChild !== shown);
    await drawn();
  };
  const slide = async (value) => {
    slider.value = value;
    slider.oninput();
    await drawn();
    return pixels(large);
  };

  await drawn();
  const report = {errors, first: faces(), first_drawings: drawings};
  report.names = names();
  await click(buttons()[3]);
  await click(buttons()[5]);
  report.morph = [await slide(0), await slide(50), await slide(100)];


  for (slider.value = 29; slider.value <= 30; slider.value++) slider.oninput();  // the second one waits
  $("new").click();
  await until(() => location.hash && !$("link").hidden);
  const link = location.hash, linked = names();
  drawings = 0;
  await click($("new"));  // while the faces of the first click are drawn
  report.new_drawings = drawings;
  report.large = large.face.name;
  report.new = faces();
  await click($("like"));
  report.like = faces();
  await click($("first"));
  report.first_again = faces();
  location.hash = link;
  await until(() => names()[0] === linked[0]);
  await drawn();
  report.linked = faces();
  report.latent = Array.from(latents(1, 1)[0]).slice(0, 4);
  report.window_width = innerWidth;
  report.visible_width = document.documentElement.clientWidth;
  report.content_width = document.documentElement.scrollWidth;
  await fetch(ADDRESS, {method: "POST", mode: "no-cors", body: JSON.stringify(report)});
});
