// SPDX-License-Identifier: Apache-2.0
// A network cable with a set delay between two network namespaces: one TUN device in each, and a forwarder between them.
//
//   link NAMESPACE_A NAMESPACE_B DEVICE
//
// makes DEVICE in both namespaces, prints "ready" and forwards packets until its standard input ends, so that it cannot
// outlive the process that started it. Each line of standard input sets what follows from then on:
//
//   DELAY_US JITTER_US LOSS      one way; a packet waits DELAY_US plus up to JITTER_US more; LOSS is a probability
//
// and is answered by "ok" or "error ..." on standard output. When the input ends, one line of JSON says what was
// forwarded. The order of packets is kept, as on a cable: with jitter a packet waits for the one before it. The devices
// belong to this process, and go with it.

#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <deque>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr size_t kLargestPacket = 65536;
constexpr size_t kMostBytesUnderWay = 64u << 20;  // each way; what comes on top is lost, as in a switch
constexpr int64_t kLongestDelayNs = 1'000'000'000;

[[noreturn]] void fail(const std::string& what) {
    throw std::runtime_error(what + ": " + std::strerror(errno));
}

int64_t now_ns() {
    timespec time{};
    clock_gettime(CLOCK_MONOTONIC, &time);
    return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

// A namespace of `ip netns`, entered for good: the device is made in the last one that was entered.
int device_in(const std::string& name_space, const char* device) {
    const std::string path = "/run/netns/" + name_space;
    const int handle = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (handle < 0) fail(path);
    if (setns(handle, CLONE_NEWNET) != 0) fail("cannot enter the network namespace " + name_space);
    close(handle);
    const int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (tun < 0) fail("/dev/net/tun");
    ifreq request{};
    std::strncpy(request.ifr_name, device, IFNAMSIZ - 1);
    request.ifr_flags = IFF_TUN | IFF_NO_PI;
    if (ioctl(tun, TUNSETIFF, &request) != 0) fail(std::string("cannot make the TUN device ") + device);
    return tun;
}

struct Settings {
    int64_t delay_ns = 0;
    int64_t jitter_ns = 0;
    double loss = 0;
};

struct Packet {
    int64_t due_ns;
    std::vector<char> bytes;
};

class Direction {
  public:
    Direction(int from, int to) : from_(from), to_(to) {}

    int from() const { return from_; }
    bool empty() const { return under_way_.empty(); }
    int64_t next_due_ns() const { return under_way_.front().due_ns; }

    void receive(const Settings& settings, std::mt19937_64& random) {
        for (;;) {
            const ssize_t size = read(from_, buffer_.data(), buffer_.size());
            if (size < 0) {
                if (errno == EAGAIN || errno == EINTR) return;
                fail("reading a packet");
            }
            ++received;
            const bool unlucky = settings.loss > 0 && std::bernoulli_distribution(settings.loss)(random);
            if (unlucky || bytes_under_way_ + size > kMostBytesUnderWay) {
                ++lost;
                continue;
            }
            int64_t due = now_ns() + settings.delay_ns;
            if (settings.jitter_ns > 0) due += std::uniform_int_distribution<int64_t>(0, settings.jitter_ns)(random);
            if (!under_way_.empty()) due = std::max(due, under_way_.back().due_ns);
            under_way_.push_back({due, {buffer_.data(), buffer_.data() + size}});
            bytes_under_way_ += size;
        }
    }

    void deliver(int64_t now) {
        while (!under_way_.empty() && under_way_.front().due_ns <= now) {
            const Packet& packet = under_way_.front();
            // A device that is down or full drops what it gets; so does a cable that ends there.
            if (write(to_, packet.bytes.data(), packet.bytes.size()) < 0) {
                ++lost;
            } else {
                ++delivered;
                delivered_bytes += packet.bytes.size();
                latest_ns = std::max(latest_ns, now - packet.due_ns);
            }
            bytes_under_way_ -= packet.bytes.size();
            under_way_.pop_front();
        }
    }

    uint64_t received = 0, delivered = 0, delivered_bytes = 0, lost = 0;
    int64_t latest_ns = 0;  // how long after its time a packet was delivered

  private:
    int from_, to_;
    std::deque<Packet> under_way_;
    size_t bytes_under_way_ = 0;
    std::vector<char> buffer_ = std::vector<char>(kLargestPacket);
};

// Whether the line was understood; nothing changes otherwise.
bool set(Settings& settings, const std::string& line) {
    long long delay_us = 0, jitter_us = 0;
    double loss = 0;
    char rest = 0;
    if (std::sscanf(line.c_str(), "%lld %lld %lf %c", &delay_us, &jitter_us, &loss, &rest) != 3) return false;
    const int64_t delay_ns = delay_us * 1000, jitter_ns = jitter_us * 1000;
    if (delay_us < 0 || jitter_us < 0 || !(loss >= 0 && loss < 1)) return false;
    if (delay_us > kLongestDelayNs / 1000 || jitter_us > kLongestDelayNs / 1000) return false;
    settings = {delay_ns, jitter_ns, loss};
    return true;
}

void wake_at(int timer, int64_t due_ns) {
    itimerspec when{};
    when.it_value = {due_ns / 1'000'000'000, due_ns % 1'000'000'000};
    if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, nullptr) != 0) fail("timerfd_settime");
}

void forward(int a, int b) {
    Direction directions[] = {{a, b}, {b, a}};
    Settings settings;
    std::mt19937_64 random(1);
    std::string input;
    const int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (timer < 0) fail("timerfd_create");
    std::puts("ready");
    std::fflush(stdout);
    for (bool more = true; more;) {
        int64_t next = 0;
        for (const Direction& one : directions) {
            if (!one.empty() && (next == 0 || one.next_due_ns() < next)) next = one.next_due_ns();
        }
        wake_at(timer, next);  // 0 stops it
        pollfd waiting[] = {{STDIN_FILENO, POLLIN, 0}, {a, POLLIN, 0}, {b, POLLIN, 0}, {timer, POLLIN, 0}};
        if (poll(waiting, 4, -1) < 0 && errno != EINTR) fail("poll");
        for (Direction& one : directions) {
            one.receive(settings, random);
            one.deliver(now_ns());
        }
        if (!waiting[0].revents) continue;
        char buffer[4096];
        const ssize_t size = read(STDIN_FILENO, buffer, sizeof buffer);
        more = size > 0;
        if (more) input.append(buffer, size);
        for (size_t end; (end = input.find('\n')) != std::string::npos; input.erase(0, end + 1)) {
            const std::string line = input.substr(0, end);
            if (set(settings, line)) {
                std::puts("ok");
            } else {
                std::printf("error: not DELAY_US JITTER_US LOSS within 0 to 1000000 and 0 to 1: %s\n", line.c_str());
            }
            std::fflush(stdout);
        }
    }
    uint64_t received = 0, delivered = 0, bytes = 0, lost = 0;
    int64_t latest = 0;
    for (const Direction& one : directions) {
        received += one.received, delivered += one.delivered, bytes += one.delivered_bytes, lost += one.lost;
        latest = std::max(latest, one.latest_ns);
    }
    std::printf("{\"received\": %llu, \"delivered\": %llu, \"bytes\": %llu, \"lost\": %llu, \"latest_us\": %.1f}\n",
                static_cast<unsigned long long>(received), static_cast<unsigned long long>(delivered),
                static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(lost), latest / 1e3);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 4) {
        std::fprintf(stderr, "usage: %s NAMESPACE_A NAMESPACE_B DEVICE\n", arguments[0]);
        return 2;
    }
    try {
        const int a = device_in(arguments[1], arguments[3]);
        const int b = device_in(arguments[2], arguments[3]);
        forward(a, b);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "link: %s\n", error.what());
        return 1;
    }
    return 0;
}
