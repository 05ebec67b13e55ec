// Draws the map of a sentence over a second copy of its image.
const scale = document.body.dataset.scale
  .split(" ")
  .map((colour) => [0, 2, 4].map((i) => parseInt(colour.substr(i, 2), 16)))

function show(sentence) {
  const article = sentence.closest("article")
  const box = article.querySelector(".map")
  const image = article.querySelector("figure > img")
  for (const other of article.querySelectorAll(".on")) {
    other.classList.remove("on")
    other.ariaPressed = false
  }
  sentence.classList.add("on")
  sentence.ariaPressed = true
  if (!sentence.dataset.map || !image) return

  if (!box.firstChild) {
    const copy = Object.assign(image.cloneNode(), { alt: "the map" })
    box.append(copy, document.createElement("canvas"))
  }
  const canvas = box.lastChild
  canvas.width = article.dataset.columns
  canvas.height = article.dataset.rows
  const context = canvas.getContext("2d")
  const cells = context.createImageData(canvas.width, canvas.height)
  for (let i = 0; i < sentence.dataset.map.length; i++) {
    // one character per cell, in 64 steps; colours between two of the scale are mixed
    const x = (sentence.dataset.map.charCodeAt(i) - 63) / 63
    const step = Math.min(8, Math.floor(9 * x))
    const part = 9 * x - step
    const colour = scale[step].map((c, k) => c + part * (scale[step + 1][k] - c))
    cells.data.set([...colour, 215 - 145 * x], 4 * i)
  }
  context.putImageData(cells, 0, 0)
  article.querySelector("figcaption").textContent = sentence.dataset.note
}

// at first, the sentence that needs the image most
function showFirst(article) {
  const sentences = [...article.querySelectorAll(".s")]
  if (!sentences.length || article.querySelector(".on")) return
  show(sentences.reduce((a, b) => (+b.dataset.score > +a.dataset.score ? b : a)))
}

for (const kind of ["mouseover", "focusin", "click"]) {
  document.addEventListener(kind, (event) => {
    const sentence = event.target.closest?.(".s")
    if (sentence && !sentence.matches(".on")) show(sentence)
  })
}

const articles = document.querySelectorAll("article")
const observer = new IntersectionObserver(
  (entries) => entries.filter((e) => e.isIntersecting).forEach((e) => showFirst(e.target)),
  { rootMargin: "600px" },
)
articles.forEach((article) => observer.observe(article))
addEventListener("beforeprint", () => articles.forEach(showFirst))
