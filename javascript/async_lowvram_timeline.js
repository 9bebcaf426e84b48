/*
 * The timeline of the last timed pass on a canvas: lanes for copying, computing and previews, stalls hatched in the compute lane.
 *
 * Sharp on any screen (drawn at the device's pixels), in the theme's colours (read from the style sheet at each drawing), and not only to
 * be looked at: its name is a sentence that says what it shows, arrow keys walk through the spans, and the line below it tells the one
 * under the pointer or chosen by keys.
 */
"use strict";
window.asyncLowvram = window.asyncLowvram || {};
(function(ours) {
    const h = (...given) => ours.element(...given);
    const REACH_PX = 4;

    /** {root, show(timeline), draw()}; `timeline` as GET /async-lowvram/timeline answers, or null. */
    ours.makeTimeline = function() {
        const {t} = ours;
        const canvas = h("canvas", {className: "alv-canvas", tabIndex: 0, role: "application", "aria-roledescription": t("timeline"),
            "aria-describedby": "async_lowvram_readout"});
        const labels = h("div", {className: "alv-lanes", "aria-hidden": "true"}, [
            h("span", {}, [t("copy")]), h("span", {}, [t("compute")]), h("span", {}, [t("preview")]),
        ]);
        const readout = h("p", {className: "alv-readout", id: "async_lowvram_readout"});
        const spoken = h("span", {className: "alv-spoken", "aria-live": "polite"});
        const title = h("h4", {className: "alv-heading"}, [t("Timeline of the last pass")]);
        const age = h("span", {className: "alv-size"});
        title.append(age);
        const picture = h("div", {className: "alv-picture"}, [labels, canvas]);
        const nothing = h("p", {className: "alv-quiet"}, [t("No pass has been timed yet: make a picture while this is open.")]);
        const root = h("section", {className: "alv-section alv-timeline"}, [title, picture, readout, spoken, nothing]);
        let read = null, chosen = null, sentence = "";

        function tell() {
            ours.setText(readout, chosen ? ours.spanWords(chosen) : sentence);
        }

        function show(timeline) {
            read = ours.readTimeline(timeline);
            chosen = null;
            sentence = read ? ours.timelineSentence(read) : "";
            ours.show(picture, Boolean(read));
            ours.show(readout, Boolean(read));
            ours.show(nothing, !read);
            ours.setAttribute(canvas, "aria-label", read ? sentence : t("Timeline of the last pass"));
            ours.setText(age, read && ours.known(read.age) ? t("{time} ago", {time: ours.seconds(Math.max(0, read.age))}) : "");
            tell();
            draw();
        }

        function choose(span) {
            if (span === chosen) return;
            chosen = span;
            tell();
            draw();
        }

        function draw() {
            const width = canvas.clientWidth;
            if (!read || !width) return;
            const scale = window.devicePixelRatio || 1, geometry = ours.timelineGeometry(read, width);
            canvas.width = Math.round(width * scale);
            canvas.height = Math.round(geometry.height * scale);
            const pen = canvas.getContext("2d");
            pen.setTransform(canvas.width / width, 0, 0, canvas.height / geometry.height, 0, 0);
            const style = getComputedStyle(root), colour = (name) => style.getPropertyValue(`--alv-${name}`).trim();
            for (const lane of ours.LANES) drawLane(pen, geometry, lane, colour, 1 / scale);
            drawAxis(pen, geometry, colour, style.fontFamily);
            if (chosen) outline(pen, geometry, colour("text"));
        }

        /** Of a span, at whole pixels of the screen, and at least one of them wide. */
        function box(geometry, span, pixel) {
            const place = geometry.lanes[span.lane === "stall" ? "compute" : span.lane];
            const snap = (x) => Math.round(x / pixel) * pixel;
            const left = Math.min(snap(geometry.x(span.start)), snap(geometry.width) - pixel), wide = snap(geometry.x(span.end)) - left;
            return [left, place.top + 3, Math.max(pixel, wide > 3 ? wide - 1 : wide), place.height - 6];
        }

        function drawLane(pen, geometry, lane, colour, pixel) {
            const {top, height} = geometry.lanes[lane];
            pen.fillStyle = colour("lane");
            pen.fillRect(0, top + 1, geometry.width, height - 2);
            for (const span of read.lanes[lane]) {
                const place = box(geometry, span, pixel);
                pen.fillStyle = colour(span.lane);
                pen.fillRect(...place);
                if (span.lane === "stall") hatch(pen, place, colour("hatch"));
            }
        }

        function hatch(pen, [left, top, wide, high], colour) {
            pen.save();
            pen.beginPath();
            pen.rect(left, top, wide, high);
            pen.clip();
            pen.strokeStyle = colour;
            pen.lineWidth = 1.5;
            pen.beginPath();
            for (let x = left - high; x < left + wide; x += 5) {
                pen.moveTo(x, top + high);
                pen.lineTo(x + high, top);
            }
            pen.stroke();
            pen.restore();
        }

        function outline(pen, geometry, colour) {
            const [left, top, wide, high] = box(geometry, chosen, 1);
            pen.strokeStyle = colour;
            pen.lineWidth = 2;
            pen.strokeRect(left - 1, top - 1, wide + 2, high + 2);
        }

        /** The pass's start and end as lines, and round times between them. */
        function drawAxis(pen, geometry, colour, font) {
            const bottom = ours.LANES.length * ours.LANE_PX, end = geometry.x(read.seconds);
            pen.font = `11px ${font}`;
            pen.textBaseline = "middle";
            pen.fillStyle = pen.strokeStyle = colour("quiet");
            pen.lineWidth = 1;
            const told = t("end {time}", {time: ours.seconds(read.seconds)});
            const endWide = pen.measureText(told).width;
            const endLeft = Math.max(0, Math.min(geometry.width - endWide, end - endWide));
            const rough = (read.to - read.from) / Math.max(2, geometry.width / 90);
            const power = 10 ** Math.floor(Math.log10(rough));
            const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
            for (let number = Math.ceil(read.from / step); number * step < read.to; number++) {
                const x = geometry.x(number * step), words = number ? ours.t("{n} ms", {n: +(number * step * 1000).toPrecision(6)}) : "0";
                const wide = pen.measureText(words).width, left = Math.max(0, Math.min(geometry.width - wide, x - wide / 2));
                if (left + wide + 8 > endLeft) break;
                pen.fillRect(Math.round(x), bottom, 1, 4);
                pen.fillText(words, left, bottom + 12);
            }
            pen.fillStyle = colour("text");
            pen.fillText(told, endLeft, bottom + 12);
            for (const x of read.from < 0 ? [geometry.x(0), end] : [end]) {
                pen.fillRect(Math.min(geometry.width - 1.5, x - 0.75), 0, 1.5, bottom + 4);
            }
        }

        canvas.addEventListener("pointermove", (event) => {
            if (!read) return;
            const geometry = ours.timelineGeometry(read, canvas.clientWidth);
            const lane = ours.LANES[Math.floor(event.offsetY / ours.LANE_PX)];
            const reach = geometry.time(REACH_PX) - geometry.time(0);
            choose(lane ? ours.spanAt(read, lane, geometry.time(event.offsetX), reach) : null);
        });
        canvas.addEventListener("pointerleave", () => choose(null));
        canvas.addEventListener("blur", () => choose(null));
        canvas.addEventListener("keydown", (event) => {
            if (!read || event.ctrlKey || event.altKey || event.metaKey) return;
            if (event.key === "Escape" && chosen) {
                // Not passed on: Escape anywhere else interrupts the picture in the making.
                event.stopPropagation();
                choose(null);
                return;
            }
            const span = ours.spanByKey(read, chosen, event.key);
            if (!span) return;
            event.preventDefault();
            choose(span);
            ours.setText(spoken, ours.spanWords(span));
        });
        if (window.ResizeObserver) new ResizeObserver(draw).observe(canvas);
        // The theme is a class of body, which the WebUI and its users' scripts set at any time.
        new MutationObserver(draw).observe(document.body, {attributes: true, attributeFilter: ["class"]});
        show(null);
        return {root, show, draw};
    };
})(window.asyncLowvram);
