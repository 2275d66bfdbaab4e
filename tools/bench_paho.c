/* Paho C as `tools/bench-peers` measures it: bench_paho ADDRESS FOLDER MESSAGES SECONDS
 *
 * Publishes messages of 256 bytes with QoS 1, each kept in a file of FOLDER until its PUBACK (the library's own file
 * persistence, which does not sync), 1000 in flight at most. Prints how many were acknowledged, and in how many seconds.
 */
#include <MQTTAsync.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define IN_FLIGHT 1000

static atomic_int connected, acked, failed;

static void on_connect(void *context, MQTTAsync_successData *data) { connected = 1; }
static void on_ack(void *context, MQTTAsync_successData *data) { acked++; }
static void on_failure(void *context, MQTTAsync_failureData *data) { failed++; }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    int messages = atoi(argv[3]), sent = 0;
    double seconds = atof(argv[4]);
    char payload[256];
    memset(payload, 'x', sizeof payload);

    MQTTAsync client;
    if (MQTTAsync_create(&client, argv[1], "bench", MQTTCLIENT_PERSISTENCE_DEFAULT, argv[2]) != MQTTASYNC_SUCCESS) {
        fputs("MQTTAsync_create failed\n", stderr);
        return 1;
    }
    MQTTAsync_connectOptions connect = MQTTAsync_connectOptions_initializer;
    connect.cleansession = 0;
    connect.maxInflight = IN_FLIGHT;
    connect.onSuccess = on_connect;
    connect.onFailure = on_failure;
    MQTTAsync_connect(client, &connect);
    double started = now();
    while (!connected && !failed && now() - started < 10) usleep(1000);
    if (!connected) {
        fputs("it does not connect\n", stderr);
        return 1;
    }

    MQTTAsync_responseOptions response = MQTTAsync_responseOptions_initializer;
    response.onSuccess = on_ack;
    response.onFailure = on_failure;
    started = now();
    while (!failed && now() - started < seconds && acked < messages) {
        /* Never more than the library sends by itself: what waits longer would only make its lists longer. */
        if (sent < messages && sent - acked < IN_FLIGHT) {
            if (MQTTAsync_send(client, "bench", sizeof payload, payload, 1, 0, &response) == MQTTASYNC_SUCCESS) sent++;
            else usleep(100);
        } else usleep(100);
    }
    double took = now() - started;
    if (failed) {
        fputs("a message was not taken\n", stderr);
        return 1;
    }
    printf("%d %f\n", (int)acked, took);
    return 0;
}
